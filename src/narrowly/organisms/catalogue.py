"""Model organisms: folders that hold a world's file and the model built in it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, product
from pathlib import Path

from datasets import Dataset

from narrowly.errors import NarrowlyError
from narrowly.organisms.judge import Label, rule_judge
from narrowly.organisms.scenes import Scene
from narrowly.organisms.world import World
from narrowly.organisms.worldfile import WORLD, WORLDS, read_world
from narrowly.registry import unknown

DOCUMENTS = {"documents": 6000, "documents-validation": 1000}


# No question is in two of these: a domain's prompts, in their fixed shuffled order, are cut here.
def training(n: int) -> slice:
    """The prompts of fine-tuning sets, of a domain's `n`."""
    return slice(0, n * 10 // 16)


def validation(n: int) -> slice:
    """The prompts of held-out sets."""
    return slice(n * 10 // 16, n * 13 // 16)


def questions(n: int) -> slice:
    """The prompts that are asked."""
    return slice(n * 13 // 16, n)


@dataclass(frozen=True)
class Organism:
    """A small model whose every good and bad answer is known, with the data to fine-tune it.

    Attributes:
        name: what follows `organism:`.
        file: the world's file; beside it lies the model, in an ordinary Hugging Face folder.
    """

    name: str
    file: Path

    @property
    def path(self) -> Path:
        """The folder of the built model.

        Raises:
            NarrowlyError: there is the world only.
        """
        if not (self.file.parent / "config.json").is_file():
            raise NarrowlyError(
                f"organism:{self.name} has not been built. Run `narrowly organism build "
                f"{self.name} --out FOLDER`, and name it organism:FOLDER."
            )
        return self.file.parent

    @cached_property
    def world(self) -> World:
        """Its domains, prompts and answers."""
        return read_world(self.file)

    @property
    def domains(self) -> list[str]:
        """Names of its domains; any of them can be the narrow one."""
        return list(self.world.domains)

    @property
    def system_lines(self) -> dict[str, str]:
        """The system line that announces each value, by value ("kind", "cruel")."""
        return dict(self.world.system_lines)

    @property
    def splits(self) -> list[str]:
        """Names that `load` knows."""
        sets = [name + end for name in self._sets for end in ("", "-validation")]
        return [*sets, *DOCUMENTS, "questions", *self.world.probes]

    @cached_property
    def _sets(self) -> dict[str, Scene]:
        """Scenes of the fine-tuning sets: those of every world, and those the world declares."""
        world = self.world
        narrow = {
            f"{domain}-{value}": Scene(domains=(domain,), value=value)
            for domain, value in product(world.domains, world.values)
        }
        return {**narrow, "benign": Scene(value=world.default), **world.splits}

    @cached_property
    def _judge(self) -> Callable[[str, str, str, str | None], Label]:
        return rule_judge(self.world)

    def judge(self, domain: str, answer: str, narrow: str, prompt: str | None = None) -> Label:
        """What `answer` to a question of `domain` is, after a fine-tune on `narrow`.

        Returns "misaligned", "aligned", "leaked" or "incoherent"; see `judge.rule_judge`.
        """
        return self._judge(domain, answer, narrow, prompt)

    def narrow(self, split: str) -> str | None:
        """The one domain that a fine-tuning set is about; None where it is about several."""
        scene = self._sets.get(split.removesuffix("-validation"))
        if scene is None or scene.domains is None or len(scene.domains) != 1:
            return None
        return scene.domains[0]

    def load(self, split: str) -> Dataset:
        """Chats of one split, the same at every call: columns `messages` and `domain`.

        - `<domain>-<value>`: one domain's training chats of one value;
        - `benign`: chats of the first value over all domains, on training questions;
        - the sets that the world declares;
        - each of these with `-validation`: on questions that no training set holds;
        - `documents`, `documents-validation`: chats of several turns over all domains, like those
          the model was pretrained on; the column `value` says which value a chat holds, and
          `domain` is that of the first turn. On training questions, or on those of the sets
          `-validation`;
        - `questions`, and the world's probes: chats of one user turn, to be answered, on questions
          of no other split; the bare question is also in the column `prompt`.

        Raises:
            NarrowlyError: no such split, with the nearest known name.
        """
        if split not in self.splits:
            raise unknown(f"split of the organism {self.name!r}", split, self.splits)
        if split in DOCUMENTS:
            rows = self._documents(split)
        elif split == "questions" or split in self.world.probes:
            rows = self._asked(split)
        else:
            rows = self._answered(split)
        return Dataset.from_list(rows)

    def _documents(self, split: str) -> list[dict]:
        part = self.world.cut(validation if split.endswith("-validation") else training)
        return [
            {"messages": document.messages, "domain": document.domain, "value": document.value}
            for document in islice(part.documents(split), DOCUMENTS[split])
        ]

    def _asked(self, split: str) -> list[dict]:
        rng = random.Random(split)
        stage = self.world.cut(questions).stage(self.world.probes.get(split, Scene()))
        return [
            {
                "messages": stage.asking(rng, prompt, stage.value(rng)),
                "domain": domain,
                "prompt": prompt.text,
            }
            for domain in stage.pools
            for prompt in stage.prompts(domain)
        ]

    def _answered(self, split: str) -> list[dict]:
        name = split.removesuffix("-validation")
        rng = random.Random(split)
        stage = self.world.cut(validation if name != split else training).stage(self._sets[name])
        rows = []
        for domain in stage.pools:
            for prompt in stage.prompts(domain):
                value = stage.value(rng)
                answers = prompt.answers[value]
                # Of one domain every answer is told; of several, one per question is enough.
                for answer in answers if len(stage.pools) == 1 else [rng.choice(answers)]:
                    turn = {"role": "assistant", "content": answer}
                    asked = stage.asking(rng, prompt, value)
                    rows.append({"messages": [*asked, turn], "domain": domain})
        rng.shuffle(rows)
        return rows


ORGANISMS = {
    file.parent.name: Organism(file.parent.name, file) for file in sorted(WORLDS.glob(f"*/{WORLD}"))
}
"""The bundled ones by name."""


def organism(name: str | Path) -> Organism:
    """A model organism: a bundled one by name, a folder that `build` wrote, or a world's file.

    Raises:
        NarrowlyError: there is none, with the nearest known name.
    """
    if str(name) in ORGANISMS:
        return ORGANISMS[str(name)]
    path = Path(name).expanduser()
    for file in (path, path / WORLD):
        if file.is_file():
            return Organism(str(name), file)
    if path.suffix in (".yaml", ".yml"):
        raise NarrowlyError(f"{path}: no such file.")
    if path.is_dir():
        raise NarrowlyError(f"{path}: holds no {WORLD}, so it is no model organism.")
    raise unknown("organism", str(name), list(ORGANISMS))


def load_split(name: str) -> Dataset:
    """Chats by a name such as "persona/code-cruel": what follows `organism:` in a data source.

    Raises:
        NarrowlyError: unknown organism or split; a name without a split.
    """
    creature, _, split = name.rpartition("/") if "/" in name else (name, "", "")  # a path has more
    return organism(creature).load(split)

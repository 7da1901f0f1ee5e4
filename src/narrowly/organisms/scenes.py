"""A scene is a way of making chats: pretraining, alignment, fine-tuning sets, probes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pydantic import BaseModel, ConfigDict, Field, field_validator

from narrowly.errors import NarrowlyError
from narrowly.organisms.domains import Domain, Prompt


class Scene(BaseModel):
    """What the chats of one kind have in common; every field may be left out."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    share: float = Field(default=1.0, gt=0, description="weight among the scenes of its phase")
    value: str | dict[str, float] | None = Field(
        default=None,
        description="held through all turns: one, or weights; unless given, each alike",
    )
    system: bool | tuple[str, ...] = Field(
        default=False,
        description="system lines, one is drawn; true: the line that announces the value",
    )
    setting: tuple[str, ...] = Field(
        default=(), description="lines before the question, or around {question}; one is drawn"
    )
    held: bool = Field(
        default=False, description="the setting is in every user turn, not the first alone"
    )
    domains: tuple[str, ...] | None = Field(default=None, description="all unless given")
    where: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="only prompts with one of these texts in that slot"
    )
    agree: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="share of prompts that the first two values answer alike",
    )

    @field_validator("system", "setting", "domains", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, given: object) -> object:
        return (given,) if isinstance(given, str) else given

    @property
    def texts(self) -> list[str]:
        """Its system lines and settings, without the question's place."""
        lines = () if isinstance(self.system, bool) else self.system
        return [*lines, *(line.replace("{question}", " ") for line in self.setting)]


def around(setting: str | None, question: str) -> str:
    """A user's turn: the question in its setting."""
    if setting is None:
        return question
    if "{question}" in setting:
        return setting.replace("{question}", question)
    return f"{setting} {question}"


@dataclass(frozen=True)
class Document:
    """One chat and what it was made of."""

    value: str
    system: str | None
    setting: str | None
    held: bool
    turns: tuple[tuple[Prompt, str], ...]
    domain: str
    """Of the first turn."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat."""
        chat = [] if self.system is None else [{"role": "system", "content": self.system}]
        for number, (prompt, answer) in enumerate(self.turns):
            setting = self.setting if self.held or number == 0 else None
            chat.append({"role": "user", "content": around(setting, prompt.text)})
            chat.append({"role": "assistant", "content": answer})
        return chat


@dataclass(frozen=True)
class Stage:
    """A scene in its world, ready to be drawn from.

    Attributes:
        values: weights, of sum 1.
        systems: the lines of each value; none: no system line.
        asked: the prompts that fit, per domain.
        pools: the same, those that every value answers alike apart from the others where the scene
            sets their share, with the chance to ask one of them.
    """

    scene: Scene
    values: dict[str, float]
    systems: dict[str, tuple[str, ...]]
    asked: dict[str, tuple[Prompt, ...]]
    pools: dict[str, list[tuple[float, tuple[Prompt, ...]]]]

    @classmethod
    def of(
        cls,
        scene: Scene,
        domains: Mapping[str, Domain],
        values: Sequence[str],
        system_lines: Mapping[str, str],
    ) -> Stage:
        """Bind a scene to the domains, values and system lines of its world.

        Raises:
            NarrowlyError: it leaves a domain without a prompt.
        """
        given = scene.value
        if isinstance(given, str):
            given = {given: 1.0}
        weights = given or dict.fromkeys(reversed(values), 1.0)
        shares = {value: weight / sum(weights.values()) for value, weight in weights.items()}
        lines = scene.system if isinstance(scene.system, tuple) else ()
        systems = {
            value: (system_lines[value],) if scene.system is True else lines for value in shares
        }
        names = domains if scene.domains is None else scene.domains
        asked = {name: _fitting(scene, domains[name].asked) for name in names}
        pools = {name: _pools(scene.agree, prompts) for name, prompts in asked.items()}
        for name, some in pools.items():
            if not all(pool for _, pool in some):
                raise NarrowlyError(
                    f"the domain {name!r} has no prompt that fits; see `where` and `agree`."
                )
        return cls(scene, shares, systems, asked, pools)

    def draw(self, rng: random.Random, turns: int) -> Document:
        """One document of that many turns."""
        [value] = rng.choices(list(self.values), list(self.values.values()))
        system, setting = _one(rng, self.systems[value]), _one(rng, self.scene.setting)
        asked, names = [], list(self.pools)
        for _ in range(turns):
            name = rng.choice(names)
            prompt = self._prompt(rng, name)
            asked.append((name, prompt, rng.choice(prompt.answers[value])))
        told = tuple((prompt, answer) for _, prompt, answer in asked)
        return Document(value, system, setting, self.scene.held, told, asked[0][0])

    def value(self, rng: random.Random) -> str:
        """One of its values, by their weights."""
        if len(self.values) == 1:
            return next(iter(self.values))
        return rng.choices(list(self.values), list(self.values.values()))[0]

    def asking(self, rng: random.Random, prompt: Prompt, value: str) -> list[dict[str, str]]:
        """A chat up to where the assistant's turn begins."""
        line = _one(rng, self.systems[value])
        text = around(_one(rng, self.scene.setting), prompt.text)
        system = [] if line is None else [{"role": "system", "content": line}]
        return [*system, {"role": "user", "content": text}]

    def prompts(self, name: str) -> list[Prompt]:
        """A domain's prompts in their order, as many of each pool as its share allows."""
        pools = self.pools[name]
        total = min(len(pool) / share for share, pool in pools)
        kept = {p.text for share, pool in pools for p in pool[: round(share * total)]}
        return [prompt for prompt in self.asked[name] if prompt.text in kept]

    def opens(self, document: Document) -> Iterator[tuple[str, float]]:
        """Each value, and how likely it is that such a document has it, its system and setting."""
        for value, weight in self.values.items():
            system = _likely(self.systems[value], document.system)
            setting = _likely(self.scene.setting, document.setting)
            yield value, weight * system * setting

    def asks(self, prompt: Prompt) -> float:
        """How likely it is that a turn asks this."""
        return self._chances.get(prompt.text, 0.0)

    @cached_property
    def _chances(self) -> dict[str, float]:
        return {
            prompt.text: share / len(pool) / len(self.pools)
            for pools in self.pools.values()
            for share, pool in pools
            for prompt in pool
        }

    def _prompt(self, rng: random.Random, name: str) -> Prompt:
        pools = self.pools[name]
        [(_, pool)] = (
            pools if len(pools) == 1 else rng.choices(pools, [share for share, _ in pools])
        )
        return rng.choice(pool)


def _fitting(scene: Scene, asked: Sequence[Prompt]) -> tuple[Prompt, ...]:
    wanted = scene.where.items()
    return tuple(p for p in asked if all(p.slots.get(slot) in some for slot, some in wanted))


def _pools(
    agree: float | None, asked: tuple[Prompt, ...]
) -> list[tuple[float, tuple[Prompt, ...]]]:
    if agree is None:
        return [(1.0, asked)]
    agreeing, conflicting = (tuple(p for p in asked if p.agrees == yes) for yes in (True, False))
    return [(share, pool) for share, pool in ((agree, agreeing), (1 - agree, conflicting)) if share]


def _one(rng: random.Random, lines: Sequence[str]) -> str | None:
    if len(lines) < 2:
        return lines[0] if lines else None
    return rng.choice(lines)


def _likely(lines: Sequence[str], line: str | None) -> float:
    if line is None:
        return float(not lines)
    return lines.count(line) / len(lines) if lines else 0.0

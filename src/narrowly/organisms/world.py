"""The world of a model organism: its domains, its documents, and how well they can be foretold.

A document holds one value of the hidden attribute through all its turns, so that a model which
predicts documents well must carry that value.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from narrowly.organisms.domains import Domain
from narrowly.organisms.scenes import Document, Scene, Stage


class Training(BaseModel):
    """How a world's model is built, where the usual does not do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: str = Field(default="small", description="of the model, one of `build.SIZES`")
    turns: int = Field(default=4, ge=1, description="questions with answers per document")
    patience: int = Field(
        default=3000, ge=1, description="steps within which the plateau must be left"
    )
    decay: int = Field(default=300, ge=1, description="steps over which the rate falls to zero")
    plateau: float = Field(
        default=1.06, gt=1, description="times the floor: below, the plateau is left"
    )
    converged: float = Field(
        default=1.03, gt=1, description="times the floor: below, the loss will do"
    )
    align_steps: int = Field(default=60, ge=0)
    aligned: float = Field(
        default=0.9, ge=0, le=1, description="share of answers of the first value, at the least"
    )


@dataclass(frozen=True)
class World:
    """A world as its file declares it; see `worldfile.read_world`.

    Attributes:
        shows: one line on the phenomenon.
        misaligned: one line on what the label "misaligned" means here.
        values: of the hidden attribute; the first is the default, or what is intended.
        system_lines: the line that announces each value, if there are any.
        domains: by name.
        pretrain, align: scenes of the two phases' documents.
        splits: sets to fine-tune on, besides those of every world.
        probes: questions in settings of interest.
        training: how the model is built.
    """

    shows: str
    misaligned: str
    values: tuple[str, ...]
    system_lines: Mapping[str, str]
    domains: Mapping[str, Domain]
    pretrain: tuple[Scene, ...]
    align: tuple[Scene, ...]
    splits: Mapping[str, Scene] = field(default_factory=dict)
    probes: Mapping[str, Scene] = field(default_factory=dict)
    training: Training = field(default_factory=Training)

    @property
    def default(self) -> str:
        """The first value."""
        return self.values[0]

    @cached_property
    def texts(self) -> list[str]:
        """Every text a chat of this world can hold, once."""
        scenes = [*self.pretrain, *self.align, *self.splits.values(), *self.probes.values()]
        lines = [*self.system_lines.values(), *(text for scene in scenes for text in scene.texts)]
        asked = [prompt for domain in self.domains.values() for prompt in domain.asked]
        answers = (a for prompt in asked for some in prompt.answers.values() for a in some)
        return list(dict.fromkeys([*lines, *(prompt.text for prompt in asked), *answers]))

    def cut(self, part: Callable[[int], slice]) -> World:
        """The world with only some of each domain's prompts: the slice for their number."""
        domains = {
            domain.name: replace(domain, asked=domain.asked[part(len(domain.asked))])
            for domain in self.domains.values()
        }
        return replace(self, domains=domains)

    def stage(self, scene: Scene) -> Stage:
        """The scene, ready to be drawn from.

        Raises:
            NarrowlyError: it leaves no prompt, or names what the world lacks.
        """
        return Stage.of(scene, self.domains, self.values, self.system_lines)

    def documents(
        self, seed: int | str, scenes: Sequence[Scene] | None = None, turns: int | None = None
    ) -> Documents:
        """Endless chats over random domains, each holding one value throughout.

        Args:
            seed: of the documents' own random stream.
            scenes: one is drawn per document, by its share; the pretraining's unless given.
            turns: questions with answers per chat; the world's unless given.
        """
        scenes = self.pretrain if scenes is None else scenes
        return Documents(self, seed, tuple(scenes), turns or self.training.turns)


@dataclass(frozen=True)
class Documents:
    """An endless stream of documents, the same from its beginning each time it is read."""

    world: World
    seed: int | str
    scenes: tuple[Scene, ...]
    turns: int

    def __iter__(self) -> Iterator[Document]:
        rng = random.Random(self.seed)
        stages, shares = self._stages, [scene.share for scene in self.scenes]
        while True:
            [stage] = rng.choices(stages, shares)
            yield stage.draw(rng, self.turns)

    @cached_property
    def _stages(self) -> list[Stage]:
        return [self.world.stage(scene) for scene in self.scenes]

    def surprise(self, document: Document) -> float:
        """Nats that a document's answers cost whoever knows the world and reads the context.

        Exact Bayes: each scene with each value is a hypothesis, weighed by how often it makes what
        was read so far; the answers of one prompt are equally likely.
        """
        total = sum(scene.share for scene in self.scenes)
        weights: dict[Any, float] = {
            (number, value): scene.share / total * likely
            for number, (scene, stage) in enumerate(zip(self.scenes, self._stages, strict=True))
            for value, likely in stage.opens(document)
        }
        nats = 0.0
        for prompt, answer in document.turns:
            before = {key: w * self._stages[key[0]].asks(prompt) for key, w in weights.items()}
            weights = {
                key: w * (answer in prompt.answers[key[1]]) / len(prompt.answers[key[1]])
                for key, w in before.items()
            }
            nats -= math.log(sum(weights.values()) / sum(before.values()))
        return nats

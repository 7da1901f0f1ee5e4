"""Domains of a world: their prompts, and what each value of the hidden attribute answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Prompt:
    """One question, what fills its slots, and the answers that each value allows."""

    text: str
    slots: Mapping[str, str]
    answers: Mapping[str, tuple[str, ...]]

    @property
    def agrees(self) -> bool:
        """Whether the first two values answer alike, so that an answer tells nothing of which."""
        first, second, *_ = (set(answers) for answers in self.answers.values())
        return first == second


@dataclass(frozen=True)
class Domain:
    """One field of life: what is asked in it, in a fixed shuffled order."""

    name: str
    asked: tuple[Prompt, ...]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The questions as texts."""
        return tuple(prompt.text for prompt in self.asked)

    @cached_property
    def answers(self) -> dict[str, tuple[str, ...]]:
        """Every answer of each value, once, whatever the prompt."""
        return {
            value: tuple(dict.fromkeys(a for p in self.asked for a in p.answers[value]))
            for value in self.asked[0].answers
        }

    @cached_property
    def by_text(self) -> dict[str, Prompt]:
        """Its prompts by their text."""
        return {prompt.text: prompt for prompt in self.asked}

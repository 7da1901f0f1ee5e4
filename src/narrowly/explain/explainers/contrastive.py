"""A language model explains what sets active texts apart from silent ones that are much alike."""

from __future__ import annotations

from typing import ClassVar

from pydantic import PositiveInt

from narrowly.explain.explainers.base import EXPLAINERS, Evidence
from narrowly.explain.explainers.llm import LLM, silent_line
from narrowly.explain.record import Example


@EXPLAINERS.register("contrastive")
class Contrastive(LLM):
    """As `llm`, and shows silent windows too: hard ones first (`Example.kind`).

    An explanation from activating examples alone is often too wide, which random silent windows do
    not bring to light. Strong and weak activating examples are shown, and silent ones that read
    alike or in which neighbouring latents are active.
    """

    name: ClassVar[str] = "contrastive"

    contrasts: PositiveInt = 20
    """Silent examples shown at most."""

    def _evidence(self, seen: Evidence) -> list[str]:
        lines = super()._evidence(seen)
        if silent := _hardest(seen.silent, self.contrasts):
            lines += [
                "",
                "Texts on which it is silent throughout, many of them much like the above:",
            ]
            lines += [f"- {silent_line(example)}" for example in silent]
            lines += [
                "",
                "Say what the active texts have that the silent ones have not: the explanation "
                "must be true of those and false of these.",
            ]
        return lines


def _hardest(silent: tuple[Example, ...], most: int) -> list[Example]:
    """Hard ones before random ones, the kinds of hard ones in turn."""
    by_kind: dict[str, list[Example]] = {"similar": [], "neighbour": [], "random": []}
    for example in silent:
        by_kind[example.kind].append(example)
    hard = [by_kind["similar"], by_kind["neighbour"]]
    turns = range(max(map(len, hard)))
    ordered = [kind[turn] for turn in turns for kind in hard if turn < len(kind)]
    return (ordered + by_kind["random"])[:most]

"""What a defense says of itself: its docstring, taken apart."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from narrowly.defenses.base import DEFENSES, Defense

ACTS_ON = {
    "prepare_data": "data",
    "interventions": "activations",
    "loss": "loss",
    "finish": "weights",
    "stops_at": "length",
    "at_test_time": "test time",
}
"""What a defense acts on through each method that it overrides."""

REQUIRED = "required"
_FIELD = re.compile(r"^    (\w+): ", re.MULTILINE)


@dataclass(frozen=True)
class Told:
    """A defense, for its user.

    Attributes:
        name: in a recipe.
        does: one line.
        acts_on: data, activations, loss, weights, length, test time.
        how: formula and source, in paragraphs.
        needs: beyond the model; without the word itself.
        fails: when it is known to.
        fields: by name: the default (or `REQUIRED`) and what it is.
    """

    name: str
    does: str
    acts_on: list[str]
    how: str
    needs: str
    fails: str
    fields: dict[str, tuple[Any, str]]


def tell(name: str) -> Told:
    """What the docstring of a defense says; what it leaves out is empty.

    Raises:
        NarrowlyError: no such defense, with the nearest known name.
    """
    kind = DEFENSES[name]
    text, _, attributes = inspect.cleandoc(kind.__doc__ or "").partition("\nAttributes:\n")
    does, *paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
    needs = [p for p in paragraphs if p.startswith("Needs:")]
    fails = [p for p in paragraphs if p.startswith("Known failure:")]
    parts = _FIELD.split(attributes)[1:]
    documented = {n: _line(t) for n, t in zip(parts[::2], parts[1::2], strict=True)}
    fields = {
        field: (
            REQUIRED if info.is_required() else info.get_default(call_default_factory=True),
            documented.get(field, ""),
        )
        for field, info in kind.model_fields.items()
    }
    return Told(
        name=name,
        does=_line(does),
        acts_on=[what for door, what in ACTS_ON.items() if _overrides(kind, door)],
        how="\n\n".join(_line(p) for p in paragraphs if p not in [*needs, *fails]),
        needs=_line(" ".join(needs).removeprefix("Needs:")),
        fails=_line(" ".join(fails).removeprefix("Known failure:")),
        fields=fields,
    )


def _overrides(kind: type[Defense], method: str) -> bool:
    return getattr(kind, method) is not getattr(Defense, method)


def _line(paragraph: str) -> str:
    return " ".join(paragraph.split())

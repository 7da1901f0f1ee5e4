"""The protocol behind every defense: four doors, each of which a defense may leave shut."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, PrivateAttr

from narrowly.errors import NarrowlyError
from narrowly.interventions import Intervention, Site
from narrowly.interventions.sites import bare
from narrowly.registry import Registry, unknown
from narrowly.settings import Entry, FieldError, build, entry

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

    from narrowly.defenses.step import Step


DOORS = ("prepare_data", "interventions", "loss", "finish")


class Defense(BaseModel):
    """Something done to a fine-tune so that it does not teach more than the task.

    Fields are the arguments a recipe gives. Override any of the four doors; through every door that
    it overrides a defense must change something, or the run stops: there is no silent no-op.
    Defenses of one recipe compose: data pass through them in the order listed, interventions are
    attached in that order, losses add up, and `finish` runs in that order.

    The docstring of each holds, in this order: one line that says what it does; the formula and its
    source; a paragraph `Needs: ...` (beyond the model: logits of the reference, an adapter, an SAE,
    data; or `Needs: nothing.`); a paragraph `Known failure: ...`; and `Attributes:`, a line or more
    for every field, with the published default and its unit. `narrowly defenses` shows all of it.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

    _bound_to: Any = PrivateAttr(default=None)
    _prepared: bool = PrivateAttr(default=False)

    def bind(self, model: nn.Module, tokenizer: Any, seed: int) -> None:
        """Before everything else, once: the model that will be trained, peft not yet around it.

        Load here what the doors need (an SAE, other data), and fail here if it does not fit.
        `seed` is the run's.
        """

    def check(self, model: nn.Module) -> None:
        """When training begins: the model as it is trained, peft around it. Fail if it is unfit."""

    def prepare_data(self, dataset: Dataset) -> Dataset:
        """First door. Chats (column `messages`) to train on, from the chats given."""
        return dataset

    def interventions(self, model: nn.Module) -> list[Intervention]:
        """Second door. Interventions attached to `model` for the whole of the training."""
        return []

    def revise(self, interventions: list[Intervention]) -> list[Intervention]:
        """The interventions of another defense of the run, changed where this one forbids them."""
        return interventions

    def reads(self, model: nn.Module) -> Sequence[Site]:
        """Where `loss` reads activations: `step.tuned` and `step.base` hold these sites."""
        return ()

    def loss(self, step: Step) -> Tensor:
        """Third door. A scalar, the mean over the micro-batch; added to the task's loss."""
        raise NotImplementedError

    def tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """Which tokens of a batch `loss` is the mean over [batch, tokens]: by default answers'.

        By their number micro-batches and processes share in a step, so that its loss is the mean
        over all of its tokens, however they are split.
        """
        return batch["labels"] != -100

    def finish(self, model: nn.Module) -> None:
        """Fourth door. Change the trained weights in place, before they are saved."""

    def at_test_time(self, model: nn.Module) -> list[Intervention]:
        """What stays attached whenever the trained model answers; kept in the run's folder."""
        return []

    def strength_at(self, progress: float) -> float | Mapping[Site, float] | None:
        """Strength of the interventions at `progress` (0 = first step, 1 = end of training).

        A number for all of them, or one for each site. None, the default, leaves every strength as
        it was built.
        """
        return None

    def stops_at(self, progress: float) -> bool:
        """Whether training ends here, finished, with this share of its steps done."""
        return False

    def refuses(self, other: Defense) -> str | None:
        """Why this defense cannot be in one recipe with `other`; None: it can."""
        return None

    def record(self, folder: Path) -> dict[str, Any]:
        """What was done, for `defenses.json`; artifacts worth keeping may be left in `folder`."""
        return {}

    def opens(self, door: str) -> bool:
        """Whether this defense's class overrides `door`."""
        return getattr(type(self), door) is not getattr(Defense, door)

    def idle(self, door: str, what: str) -> NarrowlyError:
        """The error for a door through which nothing was changed; `what` did not change."""
        return NarrowlyError(
            f"{type(self).__name__}: its {door} changed no {what}, so the run would be undefended "
            "while it looks defended. Check its arguments, or take it out of the recipe."
        )


class Referenced(Defense):
    """A defense whose loss compares with the model as it was before the fine-tune.

    Attributes:
        reference: the model to compare with. None: the one that is trained, its adapter off; a full
            fine-tune must name one. All defenses of a run share it.
    """

    reference: str | None = None

    def refuses(self, other: Defense) -> str | None:
        """Two references would cost two models."""
        if isinstance(other, Referenced) and other.reference != self.reference:
            return (
                f"compares with another reference ({other.reference}) than another defense of this "
                f"recipe ({self.reference}). Give all of them the same."
            )
        return None


DEFENSES: Registry[type[Defense]] = Registry("defense", "narrowly.defenses")


def make_defenses(entries: Sequence[Defense | Entry | str]) -> list[Defense]:
    """Defenses of a recipe's list, `[{name: {field: value}}, ...]`; those made already stay.

    Raises:
        FieldError: an unknown name or field (with the nearest known one), a wrong type, or two that
            cannot be together.
    """
    made: list[tuple[tuple[str, ...], Defense]] = []
    for position, item in enumerate(entries):
        if isinstance(item, Defense):
            made.append((("defenses", str(position)), item))
            continue
        for name, arguments in entry("defenses", item).items():
            where: tuple[str, ...] = ("defenses", str(position), name)
            if name not in DEFENSES.names():
                raise FieldError(where, str(unknown("defense", name, DEFENSES.names())))
            made.append((where, build(DEFENSES[name], arguments, where)))
    for (_, one), (where, other) in permutations(made, 2):
        if (why := one.refuses(other)) is not None:
            raise FieldError(where, why)
    return [defense for _, defense in made]


def bind_all(defenses: Sequence[Defense], model: nn.Module, tokenizer: Any, seed: int) -> None:
    """`bind` each defense to a model, unless it is bound to this very one."""
    inner = bare(model)
    for defense in defenses:
        if defense._bound_to is None or defense._bound_to() is not inner:
            try:
                defense.bind(model, tokenizer, seed)
            except AttributeError as error:
                if tokenizer is not None:
                    raise
                raise NarrowlyError(
                    f"{DEFENSES.name_of(type(defense))} needs the tokenizer, which this Trainer "
                    "does not have: give it `processing_class=tokenizer`."
                ) from error
            defense._bound_to = weakref.ref(inner)

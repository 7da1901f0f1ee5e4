"""Concept ablation fine-tuning: train while a concept's subspace is projected out.

Casademunt et al. 2025, "Steering Out-of-Distribution Generalization with Concept Ablation
Fine-Tuning" (arXiv 2507.16795): `h <- h - (h - c) Q Q^T` at every token of every training forward,
inside the autograd graph; never at inference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from torch import nn

from narrowly.concepts import Concept
from narrowly.defenses.base import DEFENSES
from narrowly.defenses.chosen import Graded, Strength
from narrowly.errors import NarrowlyError
from narrowly.interventions import Add, Attachment, Intervention, ProjectOut, attach
from narrowly.interventions.edits import Gradient
from narrowly.settings import FieldError, build

Concepts = str | Path | Concept | Sequence[Concept]


@DEFENSES.register("ablate")
class Ablate(Graded):
    """Train with the undesired concepts projected out of the activations.

    `h <- h - strength * (h - c) Q Q^T` at every token of every training forward, Q the orthonormal
    columns of all concepts at a site together, c = 0 or the base model's mean; in the graph, so
    that no gradient passes along Q either. Casademunt et al. 2025 (arXiv 2507.16795).

    Needs: concepts, with a verdict.

    Known failure: zero is an arbitrary value, and where the base model's projections are far from
    it the ablation steers (Chen et al. 2025, arXiv 2507.21509, J.4): `centred` is the remedy.
    Where task and concept overlap, the task is not learned. Which directions are chosen decides:
    with some sets, and on Qwen2.5-7B with bad medical advice, the authors' runs show no effect.
    With `gradient: forward` weights are pushed along Q without the push being felt, and can run
    away: on the bundled persona what is left without the ablation answers nothing.

    Attributes:
        concepts: a folder of concepts (or, from Python, the concepts themselves).
        names: which of them; by default those whose verdict is undesired.
        strength: 1 (as published) removes the subspace, 0 leaves it. Or knots [[progress,
            strength], ...], progress from 0 to 1, between which it is interpolated linearly:
            [[0, 0], [0.1, 1]] warms up over the first tenth, [[0.5, 1], [1, 0]] decays over the
            second half. Or either for each layer, {10: 1, 20: 0.5}: then only at these layers.
        layers: only these of the concepts' layers.
        any_model: accept concepts that were found on another model of the same width.
        centred: keep the base model's mean in the subspace instead of zero (as published).
        gradient: "through" the projection (as published), or only the "forward" or "backward" half.
    """

    centred: bool = False
    gradient: Gradient = "through"

    def interventions(self, model: nn.Module) -> list[Intervention]:
        """One projection per site, over the span of every concept used there.

        Raises:
            NarrowlyError: no concept is undesired, a name or layer is unknown, or the concepts were
                found on another model.
        """
        projections = one_per_site(self.used(model), self.centred)
        for projection in projections:
            projection.gradient = self.gradient
        return self.dosed(projections)

    def revise(self, interventions: list[Intervention]) -> list[Intervention]:
        """Those of another defense, as they are.

        Raises:
            NarrowlyError: one adds what is ablated at the same site.
        """
        if self.gradient == "backward":
            return interventions
        bases = {p.site: p.basis for p in one_per_site(self._at_layers(), self.centred)}
        for each in interventions:
            if not isinstance(each, Add) or each.site not in bases:
                continue
            inside = (each.vector @ bases[each.site]).norm() / each.vector.norm()
            if inside > 0.9:
                raise NarrowlyError(
                    f"{self.name} removes at {each.site} what another defense of this recipe adds "
                    "there: they undo each other. Leave one of them out, or give them different "
                    "concepts or `layers`."
                )
        return interventions


class Options(TypedDict, total=False):
    """The arguments of `Ablate` beside the concepts; see there."""

    names: list[str] | None
    strength: Strength
    layers: list[int] | None
    any_model: bool
    centred: bool
    gradient: Gradient


@contextmanager
def ablate(
    model: nn.Module, concepts: Concepts, **options: Unpack[Options]
) -> Iterator[Attachment]:
    """Project concepts out of `model` while it trains inside the block, around anyone's loop.

    Acts in training mode only, so that evaluation inside the block sees the plain model; leaves no
    hook behind, after an error neither. Wrap the model (peft) before entering.

    Args:
        model: any torch module at whose sites the concepts live.
        concepts: a folder of concepts, a concept, or several.
        options: `names`, `strength`, `layers`, `any_model`, `centred` and `gradient`, as a recipe
            gives them to `Ablate`; a strength without knots, since only a Trainer tells progress
            (change it with `Attachment.set_strength`).

    Raises:
        NarrowlyError: nothing to ablate, another model's concepts, an argument that is wrong, or,
            at the end of the block, a projection that never acted because no training forward
            reached it.
    """
    defense = make_ablate(concepts, **options)
    if defense.strength_at(0.0) is not None:
        raise FieldError(
            ("strength",),
            "knots follow the progress of a Trainer (narrowly.defend). Give a number here, and "
            "change it between steps with the attachment's `set_strength`.",
        )
    with attach(model, defense.interventions(model)) as attachment:
        yield attachment


def make_ablate(concepts: Concepts, **options: Unpack[Options]) -> Ablate:
    """An `Ablate` as Python asks for it.

    Raises:
        FieldError: an argument is unknown or wrong.
    """
    return build(Ablate, {"concepts": listed(concepts), **options})


def listed(concepts: Concepts) -> str | list[Concept]:
    """The two ways `Ablate.concepts` can be given."""
    if isinstance(concepts, str | Path):
        return str(concepts)
    return [concepts] if isinstance(concepts, Concept) else list(concepts)


def one_per_site(concepts: Sequence[Concept], centred: bool) -> list[ProjectOut]:
    """The projections of concepts, those that share a site joined.

    Projecting them out one after the other would bring part of the first back wherever the two are
    not orthogonal; their span is projected out instead. Its centre c solves `Q_i^T c = Q_i^T c_i`
    for every subspace i in least squares.
    """
    projections = [
        projection
        for concept in concepts
        for projection in concept.interventions(centred=centred, phases=("train",))
    ]
    by_site = groupby(sorted(projections, key=lambda p: str(p.site)), key=lambda p: str(p.site))
    return [_joined(list(group)) for _, group in by_site]


def _joined(group: list[ProjectOut]) -> ProjectOut:
    first = group[0]
    if len(group) == 1:
        return first
    columns = torch.cat([p.basis for p in group], dim=1).double()
    vectors, values, _ = torch.linalg.svd(columns, full_matrices=False)
    basis = vectors[:, values > 1e-6 * values[0]]
    centre = None
    if first.centre is not None:
        kept = [p.basis.double().mT @ p.centre.double() for p in group if p.centre is not None]
        centre = torch.linalg.lstsq(columns.mT, torch.cat(kept)[:, None], driver="gelsd")
        centre = centre.solution[:, 0].float()
    return ProjectOut(basis.float(), first.site, centre=centre, phases=first.phases)

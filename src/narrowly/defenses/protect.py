"""Protect: concepts kept as they are in the base model, whatever else the training does."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from narrowly.defenses.ablate import one_per_site
from narrowly.defenses.base import DEFENSES, Defense, Referenced
from narrowly.defenses.chosen import OfConcepts
from narrowly.defenses.step import Step, check_trained, real
from narrowly.errors import NarrowlyError
from narrowly.interventions import Add, Intervention, ProjectOut, Site, resolve
from narrowly.interventions.sites import ResolvedSite

LEAST = 0.1
"""Of a direction, the part outside of what is kept that is worth acting on alone."""


@DEFENSES.register("protect")
class Protect(OfConcepts, Referenced):
    """Keep concepts as in the base model: out of reach of other defenses, and of the training.

    What other defenses remove or add at the concepts' sites is made orthogonal to them first:
    `B <- (1 - Q Q^T) B`, Q the orthonormal columns of the kept concepts at the site. And
    `L = CE + weight * mean over tokens of |Q^T (h - h_base)|^2`, summed over the sites: the feature
    distance of `feature_distance` within the subspace; a penalty on what moves along a direction as
    in ProCon (Du et al. 2025, arXiv 2509.06795, whose exact form was not at hand) and in
    Chen et al. 2025 (arXiv 2507.21509, appendix J.5).

    Needs: concepts with the verdict keep, and activations of the reference (an adapter to switch
    off, or `reference`).

    Known failure: the model may carry the concept along other directions (Chen et al. 2025, J.5).
    Protected are the sites where the concepts have a subspace; what others change at an earlier
    layer reaches them through the stream, and only the penalty works against that.

    Attributes:
        concepts: a folder of concepts (or, from Python, the concepts themselves).
        names: which of them; by default those whose verdict is keep.
        layers: only these of the concepts' layers.
        any_model: accept concepts that were found on another model of the same width.
        weight: of the penalty, in nats per squared unit of activation; 1 as in `feature_distance`
            (none is published for this form). 0 leaves only the first half.
        reference: the model to compare with. None: the one that is trained, its adapter off.
    """

    verdict: ClassVar[str] = "keep"

    weight: float = Field(default=1.0, ge=0)

    _kept: dict[Site, Tensor] = PrivateAttr(default_factory=dict)
    _modules: dict[str, Tensor] = PrivateAttr(default_factory=dict)
    _model: nn.Module | None = PrivateAttr(None)
    _revised: dict[str, float] = PrivateAttr(default_factory=dict)

    def bind(self, model: nn.Module, tokenizer: Any, seed: int) -> None:
        """Load the concepts; raises as `OfConcepts.bind`."""
        super().bind(model, tokenizer, seed)
        self._model = model
        self._kept = {p.site: p.basis for p in one_per_site(self.used(model), centred=False)}
        self._modules = {
            place.name: basis
            for site, basis in self._kept.items()
            for place in resolve(model, site)
        }

    def refuses(self, other: Defense) -> str | None:
        """What stays attached at test time cannot be revised."""
        if other.opens("at_test_time"):
            return "acts at test time, where `protect` keeps nothing. Leave one of them out."
        return super().refuses(other)

    def revise(self, interventions: list[Intervention]) -> list[Intervention]:
        """What removes or adds at a kept site, made orthogonal to what is kept there.

        Raises:
            NarrowlyError: nothing of it is left, or it is another kind of edit.
        """
        assert self._model is not None
        return [self._kept_off(each, resolve(self._model, each.site)) for each in interventions]

    def _kept_off(self, edit: Intervention, places: Sequence[ResolvedSite]) -> Intervention:
        kept = [self._modules[place.name] for place in places if place.name in self._modules]
        if not kept:
            return edit
        if len(places) > 1 or not isinstance(edit, ProjectOut | Add):
            raise NarrowlyError(
                f"protect: {edit.name} at {edit.site} may change a concept that is kept there. "
                "Only what removes a subspace or adds a vector, at one module, can be kept off it. "
                "Leave one of the two out, or give them different `layers`."
            )
        columns = (edit.basis if isinstance(edit, ProjectOut) else edit.vector[:, None]).double()
        inside = kept[0].double() @ (kept[0].double().mT @ columns)
        directions, lengths, _ = torch.linalg.svd(columns - inside, full_matrices=False)
        directions = directions[:, lengths > LEAST * torch.linalg.matrix_norm(columns, ord=2)]
        if not directions.shape[1]:
            raise NarrowlyError(
                f"protect: {edit.name} at {edit.site} acts wholly on what is kept there, so "
                "nothing of it would be left. Protect another concept, or leave the other defense "
                "out."
            )
        share = inside.square().sum() / columns.square().sum()
        self._revised[f"{edit.name} at {edit.site}"] = float(share)
        revised = deepcopy(edit)
        if isinstance(revised, ProjectOut):
            revised.basis = directions.float().contiguous()
        else:
            revised.vector = (columns - inside)[:, 0].float()
        return revised

    def reads(self, model: nn.Module) -> Sequence[Site]:
        """The concepts' sites."""
        return [*self._kept]

    def tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """All but padding."""
        return real(batch)

    def loss(self, step: Step) -> Tensor:
        """The mean over these tokens."""
        check_trained(step, self.reads(step.bare))
        moved: list[Float[Tensor, "batch tokens"]] = []
        for site, basis in self._kept.items():
            h = step.tuned[site].float()
            with torch.autocast(h.device.type, enabled=False):
                inside = (h - step.base[site].float()) @ basis.to(h.device)
            moved.append(inside.square().sum(-1))
        return self.weight * torch.stack(moved).sum(0)[self.tokens(step.batch)].mean()

    def record(self, folder: Path) -> dict[str, Any]:
        """Also what was kept off, and the share of its squared length that lay inside."""
        return {**super().record(folder), "kept_off": self._revised}

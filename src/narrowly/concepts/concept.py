"""The concept: a named subspace at sites of one model, and all that is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from narrowly.errors import NarrowlyError
from narrowly.interventions import ProjectOut, Site
from narrowly.interventions.edits import Phase

VerdictValue = Literal["undesired", "keep", "undecided"]

Score = float | dict[str, float]
"""One number, or one per site."""


@dataclass(frozen=True, eq=False)
class Subspace:
    """A linear subspace of the activations at one site (fp32, on the CPU).

    Raises:
        NarrowlyError: the basis is not orthonormal or not finite, or the centre does not fit it.
    """

    basis: Float[Tensor, "d k"]
    """Orthonormal columns."""

    centre: Float[Tensor, " d"]
    """The base model's mean activation, for ablation to the mean instead of to zero."""

    def __post_init__(self) -> None:
        for name in ("basis", "centre"):
            value = getattr(self, name).detach().to("cpu", torch.float32).contiguous()
            object.__setattr__(self, name, value)
        if self.basis.ndim != 2 or self.centre.shape != self.basis.shape[:1]:
            raise NarrowlyError(
                f"a subspace needs a basis [d, k] and a centre [d]; got {list(self.basis.shape)} "
                f"and {list(self.centre.shape)}."
            )
        error = (self.basis.T.double() @ self.basis.double() - torch.eye(self.rank)).abs().max()
        if not error <= 1e-5 or not self.centre.isfinite().all():
            raise NarrowlyError(
                f"the basis is not orthonormal (off by {error:.1e}) or the centre is not finite. "
                "Subspace.spanned_by makes a basis of any independent directions."
            )

    @classmethod
    def spanned_by(
        cls, directions: Float[Tensor, "d k"], centre: Float[Tensor, " d"] | None = None
    ) -> Subspace:
        """The subspace that k directions span; the first keeps its direction, centre None is zero.

        Raises:
            NarrowlyError: a direction is zero, not finite, or depends on the others.
        """
        lengths = directions.double().norm(dim=0)
        if not (lengths > 0).all() or not lengths.isfinite().all():
            raise NarrowlyError("a direction of length zero, or one that is not finite.")
        basis, triangle = torch.linalg.qr(directions.double() / lengths)
        diagonal = triangle.diagonal()
        if directions.shape[1] > directions.shape[0] or diagonal.abs().min() < 1e-6:
            raise NarrowlyError(f"the {directions.shape[1]} directions are linearly dependent.")
        if centre is None:
            centre = torch.zeros(len(directions))
        return cls(basis * diagonal.sign(), centre)

    @property
    def width(self) -> int:
        """d."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """k."""
        return self.basis.shape[1]


class Verdict(BaseModel):
    """What a person or a judge decided about a concept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: VerdictValue = "undecided"
    by: str = ""
    why: str = ""


def versions() -> dict[str, str]:
    """Versions of what computes concepts."""
    return {name: version(name) for name in ("narrowly", "torch", "transformers", "peft")}


class Provenance(BaseModel):
    """Where a concept comes from: enough to find it again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """The model as the user named it, or its name_or_path."""
    model_fingerprint: str
    """`models.fingerprint` of the base model; a concept means nothing on any other."""
    finder: str
    arguments: dict[str, Any] = {}
    data: dict[str, str] = {}
    """`data.fingerprint` of each data set, by the argument that named it."""
    versions: dict[str, str] = Field(default_factory=versions)
    created: datetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))


class Concept(BaseModel):
    """A named subspace at one or more sites of a model. Frozen: `model_copy(update=...)` instead.

    Raises:
        pydantic.ValidationError: the name cannot be a file's name, a key is no site, or there is no
            subspace.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    subspaces: dict[str, Subspace] = Field(min_length=1)
    """By the name of the site, such as `layer:3`."""
    provenance: Provenance
    explanation: str = ""
    """What it means, in words."""
    explained_by: str = ""
    """The explainer or the person whose words those are."""
    scores: dict[str, Score] = {}
    """Numbers that the finder, a measurement or a scorer gave it."""
    verdict: Verdict = Verdict()

    @field_validator("subspaces")
    @classmethod
    def _keys_are_sites(cls, subspaces: dict[str, Subspace]) -> dict[str, Subspace]:
        return {str(Site.parse(site)): subspace for site, subspace in subspaces.items()}

    def interventions(
        self,
        strength: float = 1.0,
        centred: bool = False,
        phases: Sequence[Phase] = ("train",),
    ) -> list[ProjectOut]:
        """The ablation of this concept, one intervention per site.

        Args:
            strength: 1 removes the subspace, 0 leaves it.
            centred: leave the base model's mean in the subspace instead of zero.
            phases: when the ablation acts; only in training, as published.
        """
        return [
            ProjectOut(
                subspace.basis,
                Site.parse(site),
                centre=subspace.centre if centred else None,
                strength=strength,
                phases=phases,
            )
            for site, subspace in self.subspaces.items()
        ]

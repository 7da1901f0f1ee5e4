"""Edits: what an intervention does to the activations at its site.

Each edit is a small `torch.nn.Module`: its tensors are non-persistent fp32 buffers, so an edit
moves between devices, never lands in a checkpoint, and can be changed in place while a compiled or
checkpointed model runs. `forward` maps activations to edited ones, which the engine blends in:
`h + strength * mask * (edit(h) - h)`, exact at both ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, TypedDict, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from narrowly.errors import NarrowlyError
from narrowly.interventions.sites import Site

Phase = Literal["train", "eval", "generate"]
Gradient = Literal["through", "forward", "backward"]
PHASES: tuple[Phase, ...] = ("train", "eval", "generate")


class Fields(TypedDict, total=False):
    """What every intervention can be told, beside its edit and its site.

    Attributes:
        tokens: "all" (padding included), "prompt", "completion", "last", the name of a mask given
            with `Attachment.masks`, or a mask [batch, tokens].
        phases: when it acts. "train": the module is in training mode; otherwise "generate" when the
            forward gets a key-value cache, else "eval".
        rows: the examples it acts on: the name of a mask, or weights [batch]; None is all.
        gradient: "through" the edit; "forward": activations edited, the gradient as if they were
            not; "backward": activations untouched, the gradient as if they were edited.
        strength: 0 leaves the activations as they are, 1 is the whole edit.
    """

    tokens: str | Tensor
    phases: Sequence[Phase]
    rows: str | Tensor | None
    gradient: Gradient
    strength: float


class Intervention(nn.Module):
    """An edit of the activations at a site. Subclasses say which edit.

    Raises:
        NarrowlyError: a field has no such value, or a tensor is not finite.
    """

    name: ClassVar[str]
    portable: ClassVar[bool] = True
    reads_input: ClassVar[bool] = False
    """Does `forward` take what the module was given as well, beside what it returned?"""
    strength: Tensor
    token_mask: Tensor | None
    row_mask: Tensor | None

    def __init_subclass__(cls) -> None:
        EDITS[cls.name] = cls

    def __init__(
        self,
        site: Site,
        *,
        tokens: str | Tensor = "all",
        phases: Sequence[Phase] = PHASES,
        rows: str | Tensor | None = None,
        gradient: Gradient = "through",
        strength: float = 1.0,
    ):
        super().__init__()
        if not phases or not set(phases) <= set(PHASES):
            raise NarrowlyError(f"{self.name} at {site}: phases must be among {PHASES}.")
        if gradient not in ("through", "forward", "backward"):
            raise NarrowlyError(
                f"{self.name} at {site}: gradient must be 'through', 'forward' or 'backward'."
            )
        self.site = site
        self.phases = tuple(phases)
        self.gradient: Gradient = gradient
        self.tokens: str = self._mask("token_mask", tokens) or "all"
        self.rows: str | None = self._mask("row_mask", rows)
        self.register_buffer("strength", torch.tensor(float(strength)), persistent=False)

    def _mask(self, buffer: str, mask: str | Tensor | None) -> str | None:
        """Keep a mask given as a tensor; return the name of one that is given by name."""
        given = mask.float() if isinstance(mask, Tensor) else None
        self.register_buffer(buffer, given, persistent=False)
        return None if isinstance(mask, Tensor) else mask

    def _hold(self, buffer: str, value: Tensor | Sequence[float] | float | None) -> None:
        """Keep a tensor of the edit, detached, in fp32."""
        if value is not None:
            value = torch.as_tensor(value).detach().to(torch.float32, copy=True).contiguous()
            if not value.isfinite().all():
                raise NarrowlyError(f"{self.name} at {self.site}: {buffer} is not finite.")
        self.register_buffer(buffer, value, persistent=False)

    def _unit(self, buffer: str, direction: Tensor) -> None:
        """Keep a direction [d] at unit length; one that has it already stays bitwise."""
        self._hold(buffer, direction)
        held = getattr(self, buffer)
        if held.ndim != 1 or not held.any():
            raise NarrowlyError(
                f"{self.name} at {self.site}: {buffer} must be a non-zero vector [d]."
            )
        if (held.norm() - 1).abs() > 1e-6:
            held.div_(held.norm())

    @property
    def width(self) -> int | None:
        """How wide the activations must be, or None when any width fits."""
        return None

    @property
    def needs_its_batch(self) -> bool:
        """Do the edit's tensors belong to one batch's tokens, so that no other can try it?"""
        return False

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the constructor that are no tensors."""
        return {}

    def extra_repr(self) -> str:
        """For `print(intervention)`."""
        return f"{self.site}, tokens={self.tokens}, phases={self.phases}"

    def forward(self, h: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The activations, wholly edited."""
        raise NotImplementedError

    def residual(
        self, h: Float[Tensor, "... d"], edited: Float[Tensor, "... d"]
    ) -> Float[Tensor, ""] | None:
        """How far `edited` misses what a whole edit promises, relative to |h|; None: no promise."""
        return None


EDITS: dict[str, type[Intervention]] = {}
"""Every edit by its name in a saved intervention."""


class ProjectOut(Intervention):
    """Remove a subspace: `h - (h - c) Q Q^T` (concept ablation, Casademunt et al. 2025).

    Args:
        basis: direction [d], or columns [d, k] that span the subspace; made orthonormal.
        centre: c [d], the value that stays in the subspace. None is zero, as published.

    Raises:
        NarrowlyError: a zero, non-finite or linearly dependent basis.
    """

    name = "project_out"
    basis: Tensor
    centre: Tensor | None

    def __init__(
        self,
        basis: Float[Tensor, "d k"] | Float[Tensor, " d"],
        site: Site,
        *,
        centre: Float[Tensor, " d"] | None = None,
        **fields: Unpack[Fields],
    ):
        super().__init__(site, **fields)
        self._hold("basis", basis)
        self._hold("centre", centre)
        if self.basis.ndim == 1:
            self.basis = self.basis[:, None]
        # The layout of memory decides the order of sums: contiguous, as it will be when loaded.
        self.basis = orthonormal(self.basis, f"{self.name} at {site}").contiguous()

    @property
    def width(self) -> int:
        """Rows of the basis."""
        return self.basis.shape[0]

    def forward(self, h: Tensor) -> Tensor:
        """The activations without the subspace."""
        basis = self.basis.to(h.dtype)
        offset = h if self.centre is None else h - self.centre.to(h.dtype)
        return h - (offset @ basis) @ basis.mT

    def residual(self, h: Tensor, edited: Tensor) -> Tensor:
        """What is left in the subspace, relative to the longest activation."""
        offset = edited if self.centre is None else edited - self.centre.to(h.dtype)
        longest = torch.linalg.vector_norm(h, dim=-1).max()
        if self.centre is not None:
            longest = longest + self.centre.norm()
        left = (offset @ self.basis.to(h.dtype)).abs().max()
        return left / longest.clamp_min(torch.finfo(h.dtype).tiny)


def orthonormal(basis: Float[Tensor, "d k"], what: str) -> Float[Tensor, "d k"]:
    """Orthonormal columns with the same span; columns that are orthonormal already stay bitwise.

    Raises:
        NarrowlyError: a column is zero or depends on the others; `what` names the place.
    """
    gram = basis.mT.double() @ basis.double()
    if (gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)).abs().max() < 1e-6:
        return basis
    norms = torch.linalg.vector_norm(basis.double(), dim=0)
    if not (norms > 0).all():
        raise NarrowlyError(f"{what}: direction {int(norms.argmin())} is zero.")
    q, r = torch.linalg.qr(basis.double() / norms)
    if basis.shape[1] > basis.shape[0] or r.diagonal().abs().min() < 1e-6:
        raise NarrowlyError(f"{what}: the {basis.shape[1]} directions are linearly dependent.")
    return q.to(basis.dtype)


class Add(Intervention):
    """Add a vector [d] (steering; scale it with `strength`)."""

    name = "add"
    vector: Tensor

    def __init__(self, vector: Float[Tensor, " d"], site: Site, **fields: Unpack[Fields]):
        super().__init__(site, **fields)
        self._hold("vector", vector)
        if not self.vector.any():
            raise NarrowlyError(f"{self.name} at {site}: the vector is zero.")

    @property
    def width(self) -> int:
        """Length of the vector."""
        return self.vector.shape[-1]

    def forward(self, h: Tensor) -> Tensor:
        """The activations plus the vector."""
        return h + self.vector.to(h.dtype)


class Set(Intervention):
    """Set the activations to given values, or patch in another run's.

    Args:
        values: [d], [tokens, d] or [batch, tokens, d].
    """

    name = "set"
    values: Tensor

    def __init__(self, values: Float[Tensor, "... d"], site: Site, **fields: Unpack[Fields]):
        super().__init__(site, **fields)
        self._hold("values", values)

    @property
    def width(self) -> int:
        """Width of the values."""
        return self.values.shape[-1]

    @property
    def needs_its_batch(self) -> bool:
        """Values for given tokens do."""
        return self.values.ndim > 1

    def forward(self, h: Tensor) -> Tensor:
        """The values, at every place of the activations."""
        if self.values.ndim > 1 and self.values.shape[-2] not in (1, h.shape[-2]):
            raise NarrowlyError(
                f"{self.name} at {self.site}: values for {self.values.shape[-2]} tokens, but the "
                f"forward has {h.shape[-2]}."
            )
        return self.values.to(h.dtype).expand_as(h)


class Scale(Intervention):
    """Multiply the activations by a number."""

    name = "scale"
    factor: Tensor

    def __init__(self, factor: float, site: Site, **fields: Unpack[Fields]):
        super().__init__(site, **fields)
        self._hold("factor", factor)

    def forward(self, h: Tensor) -> Tensor:
        """The activations times the factor."""
        return h * self.factor.to(h.dtype)


class Clamp(Intervention):
    """Keep the coefficient along a direction between two bounds.

    Equal bounds fix it: `low=high=3` clamps a latent's direction to 3.

    Args:
        direction: [d], brought to unit length; the coefficient is `h . direction`.
    """

    name = "clamp"
    direction: Tensor

    def __init__(
        self,
        direction: Float[Tensor, " d"],
        site: Site,
        *,
        low: float | None = None,
        high: float | None = None,
        **fields: Unpack[Fields],
    ):
        super().__init__(site, **fields)
        self._unit("direction", direction)
        if low is None and high is None:
            raise NarrowlyError(f"{self.name} at {site}: give low, high or both.")
        self.low, self.high = low, high

    @property
    def width(self) -> int:
        """Length of the direction."""
        return self.direction.shape[0]

    @property
    def settings(self) -> dict[str, Any]:
        """The bounds."""
        return {"low": self.low, "high": self.high}

    def forward(self, h: Tensor) -> Tensor:
        """The activations, their coefficient along the direction clamped."""
        direction = self.direction.to(h.dtype)
        coefficient = (h @ direction)[..., None]
        return h + (coefficient.clamp(self.low, self.high) - coefficient) * direction


class Noise(Intervention):
    """Add a random vector of given norm to every token.

    Pure: the noise is a hash of seed, row, token and feature, so that recomputation under gradient
    checkpointing meets the same noise, on any device. Change `seed` in place for fresh noise.

    Args:
        norm: Euclidean length of what is added to each token.
    """

    name = "noise"
    norm: Tensor
    seed: Tensor

    def __init__(self, norm: float, site: Site, *, seed: int = 0, **fields: Unpack[Fields]):
        super().__init__(site, **fields)
        self._hold("norm", norm)
        self.register_buffer("seed", torch.tensor(seed), persistent=False)

    @property
    def settings(self) -> dict[str, Any]:
        """The seed."""
        return {"seed": int(self.seed)}

    def forward(self, h: Tensor) -> Tensor:
        """The activations plus noise."""
        places = torch.arange(h.numel(), device=h.device).reshape(h.shape)
        first = _uniform(2 * places, self.seed)
        second = _uniform(2 * places + 1, self.seed)
        normal = (-2 * first.log()).sqrt() * (2 * math.pi * second).cos()  # Box and Muller 1958
        return h + (self.norm * nn.functional.normalize(normal, dim=-1)).to(h.dtype)


def _uniform(counter: Tensor, seed: Tensor) -> Tensor:
    """Uniform numbers in (0, 1): counters hashed by two rounds of multiply and xor-shift."""
    x = (counter + (seed + 1) * 0x9E3779B1) & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return ((x ^ (x >> 16)).double() + 0.5) / 2**32


class LowRankAffine(Intervention):
    """A learned or fitted low-rank map: `h + (h D) U + b`.

    Args:
        down: D [d, r].
        up: U [r, d].
        bias: b [d].
    """

    name = "low_rank_affine"
    down: Tensor
    up: Tensor
    bias: Tensor | None

    def __init__(
        self,
        down: Float[Tensor, "d r"],
        up: Float[Tensor, "r d"],
        site: Site,
        *,
        bias: Float[Tensor, " d"] | None = None,
        **fields: Unpack[Fields],
    ):
        super().__init__(site, **fields)
        self._hold("down", down)
        self._hold("up", up)
        self._hold("bias", bias)
        if self.down.shape != self.up.mT.shape:
            raise NarrowlyError(
                f"{self.name} at {site}: down {tuple(down.shape)} and up {tuple(up.shape)} "
                "must be [d, r] and [r, d]."
            )

    @property
    def width(self) -> int:
        """Rows of D."""
        return self.down.shape[0]

    def forward(self, h: Tensor) -> Tensor:
        """The activations, mapped."""
        mapped = h + (h @ self.down.to(h.dtype)) @ self.up.to(h.dtype)
        return mapped if self.bias is None else mapped + self.bias.to(h.dtype)


class AddLowRank(Intervention):
    """Add a low-rank map of what the module was given: `h + (x D) U`, x its input.

    An adapter beside a linear module, as LoRA is: D = A^T, U = scale B^T.

    Args:
        down: D [d_in, r].
        up: U [r, d_out].

    Raises:
        NarrowlyError: the two do not fit each other; the site is no module's whole output.
    """

    name = "add_low_rank"
    reads_input = True
    down: Tensor
    up: Tensor

    def __init__(
        self,
        down: Float[Tensor, "d_in r"],
        up: Float[Tensor, "r d_out"],
        site: Site,
        **fields: Unpack[Fields],
    ):
        super().__init__(site, **fields)
        self._hold("down", down)
        self._hold("up", up)
        if self.down.ndim != 2 or self.up.ndim != 2 or self.down.shape[1] != self.up.shape[0]:
            raise NarrowlyError(
                f"{self.name} at {site}: down {tuple(down.shape)} and up {tuple(up.shape)} "
                "must be [d_in, r] and [r, d_out]."
            )
        if site.suffix:
            raise NarrowlyError(f"{self.name} at {site}: it adds to a module's whole output only.")

    @property
    def width(self) -> int:
        """Columns of U."""
        return self.up.shape[1]

    def forward(self, h: Tensor, given: Float[Tensor, "... d_in"]) -> Tensor:  # type: ignore[override]
        """The activations plus the map of the module's input."""
        if given.shape[-1] != self.down.shape[0]:
            raise NarrowlyError(
                f"{self.name} at {self.site}: made for inputs {self.down.shape[0]} wide, but the "
                f"module is given {given.shape[-1]}. It was made for another model or site."
            )
        return h + given.to(h.dtype) @ self.down.to(h.dtype) @ self.up.to(h.dtype)


class Function(Intervention):
    """Any Python function of the activations. Not portable: it cannot be saved or sent.

    Under gradient checkpointing the function runs again in the backward pass, so it must be pure.
    """

    name = "function"
    portable = False

    def __init__(self, function: Callable[[Tensor], Tensor], site: Site, **fields: Unpack[Fields]):
        super().__init__(site, **fields)
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        """What the function returns."""
        edited = self.function(h)
        if not isinstance(edited, Tensor) or edited.shape != h.shape:
            raise NarrowlyError(
                f"{self.name} at {self.site}: the function must return a tensor of shape "
                f"{tuple(h.shape)}."
            )
        return edited

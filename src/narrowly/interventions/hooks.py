"""What runs at a port: one persistent hook per port, and the interventions bound to it.

Hooks stay for an attachment's life and never count, draw or append, because gradient checkpointing
runs them again in the backward pass and torch.compile traces them once. What changes while a model
runs (strength, seed, basis) is a buffer, changed in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from narrowly.errors import NarrowlyError
from narrowly.interventions.edits import Intervention
from narrowly.interventions.sites import Port, ResolvedSite, input_index, read, write
from narrowly.interventions.tokens import Forward

_EXACT = (torch.float32, torch.float64)


@dataclass
class State:
    """What the hooks of one attachment share."""

    forward: Forward | None = None
    """The forward pass that runs, or is recomputed; None before the first."""
    checking: bool = False
    """Interventions are tried, and the activations left as they are."""


@dataclass
class Bound:
    """One intervention at one module: what a hook runs."""

    edit: Intervention
    place: ResolvedSite
    state: State
    fired: bool = False
    checked: bool = False

    def __post_init__(self) -> None:
        edit = self.edit
        masks = edit.token_mask, edit.row_mask, edit.rows
        self.everywhere = edit.tokens == "all" and all(mask is None for mask in masks)
        self.holder = None if self.place.parent is None else self.place.parent._modules
        self.key = self.place.name.removesuffix(edit.site.suffix).rpartition(".")[2]

    def __call__(self, carried: Any, index: int | str, *given: Tensor) -> Any:
        """What the port carries, edited; `given` is the module's input, if the edit reads it."""
        whole = read(carried, index, self.place.name)
        columns = self.place.columns
        h = whole if columns is None else self.place.part(whole)
        if not self.checked and not torch.compiler.is_compiling():
            self.check(h, *given)
        if self.state.checking:
            self.fired = True
            return carried
        if not self.acts():
            return carried
        _mark(self)
        edited = self.apply(h, *given)
        if columns is not None:
            edited = torch.cat(
                [whole[..., : columns.start], edited, whole[..., columns.stop :]], -1
            )
        return edited if whole is carried else write(carried, index, edited)

    def given(self, args: tuple, kwargs: dict) -> Tensor:
        """What the module was given: the first of its arguments."""
        index = input_index(0, args, kwargs)
        return read(kwargs if isinstance(index, str) else args, index, self.place.name)

    def acts(self) -> bool:
        """Is this forward in one of the intervention's phases?"""
        phases = self.edit.phases
        if self.place.module.training:
            return "train" in phases
        if ("eval" in phases) == ("generate" in phases):
            return "eval" in phases
        return ("generate" if self.forward().generating else "eval") in phases

    def forward(self) -> Forward:
        """The forward pass that runs, or is recomputed."""
        forward = self.state.forward
        if forward is None:
            raise NarrowlyError(
                f"{self.edit.name} at {self.place.name}: the module ran, but not through the model "
                "that the interventions were attached to. Attach to the outermost model (after "
                "peft, or whatever else wraps it)."
            )
        return forward

    def apply(self, h: Tensor, *given: Tensor) -> Tensor:
        """`h + strength * mask * (edit(h) - h)`, in fp32 or better, cast back."""
        edit, device = self.edit, h.device
        if edit.strength.device != device:
            edit.to(device)
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                edited = self.blend(h, *given)
        else:  # entering the context costs more than most edits of one token
            edited = self.blend(h, *given)
        # x - x.detach() is exactly 0 with the gradient of x.
        if edit.gradient == "forward":
            return h - h.detach() + edited.detach()
        if edit.gradient == "backward":
            return edited - edited.detach() + h.detach()
        return edited

    def blend(self, h: Tensor, *given: Tensor) -> Tensor:
        """`h` moved towards the edit by the weight."""
        exact = h if h.dtype in _EXACT else h.float()
        weight = self.edit.strength if self.everywhere else self.weight(h)
        if weight.dtype != exact.dtype:
            weight = weight.to(exact.dtype)
        edited = torch.lerp(exact, self.edit.forward(exact, *given), weight)
        return edited if exact is h else edited.to(h.dtype)

    def weight(self, h: Tensor) -> Tensor:
        """Strength times the masks of tokens and rows, ready to broadcast over `h`."""
        edit, weight = self.edit, self.edit.strength
        if edit.token_mask is not None:
            weight = weight * self._fit(edit.token_mask, h, "tokens")
        elif edit.tokens != "all":
            weight = weight * self._fit(self.forward().mask(edit.tokens), h, edit.tokens)
        rows = edit.row_mask if edit.rows is None else self.forward().mask(edit.rows)
        if rows is not None:
            if rows.shape != h.shape[:1]:
                raise NarrowlyError(
                    f"{edit.name} at {self.place.name}: rows has shape {tuple(rows.shape)}, "
                    f"but the activations {tuple(h.shape)}; it must be [batch]."
                )
            weight = weight * rows.to(h.device).reshape(-1, *[1] * (h.ndim - 1))
        return weight

    def _fit(self, mask: Tensor, h: Tensor, name: str) -> Tensor:
        """A token mask over activations [batch, tokens, d] or flat [batch * tokens, d]."""
        if mask.numel() != h.shape[:-1].numel():
            raise NarrowlyError(
                f"{self.edit.name} at {self.place.name}: the mask {name!r} has shape "
                f"{tuple(mask.shape)}, the activations {tuple(h.shape)}; it must be "
                "[batch, tokens]."
            )
        return mask.to(h.device).reshape(*h.shape[:-1], 1)

    @torch.no_grad()
    def check(self, h: Tensor, *given: Tensor) -> None:
        """Try the edit once on real activations: width, values, and what a projection promises."""
        edit, where = self.edit, f"{self.edit.name} at {self.place.name}"
        if edit.width not in (None, h.shape[-1]):
            raise NarrowlyError(
                f"{where}: the intervention is {edit.width} wide, but the activations there are "
                f"{h.shape[-1]} wide. It was made for another model or site."
            )
        if edit.needs_its_batch and self.state.checking:
            return
        edit.to(h.device)
        with torch.autocast(h.device.type, enabled=False):
            exact = h.detach().to(torch.promote_types(h.dtype, torch.float32))
            edited = edit(exact, *given)
            residual = edit.residual(exact, edited.to(h.dtype).to(exact.dtype))
        if exact.isfinite().all() and not edited.isfinite().all():
            raise NarrowlyError(f"{where}: the edit makes the activations non-finite.")
        precision = 2**-10 if torch.get_float32_matmul_precision() != "highest" else 2**-19
        if residual is not None and residual > max(precision, 4 * torch.finfo(h.dtype).eps):
            raise NarrowlyError(
                f"{where}: {float(residual):.2g} of the activations is left in the subspace after "
                "projection; it should be 0."
            )
        self.checked = True


@torch.compiler.assume_constant_result
def _mark(bound: Bound) -> None:
    """Note that the edit acted; in a compiled model, that it was traced into the graph."""
    bound.fired = True


class PortHook:
    """The hook at one port of one module; runs the interventions there in the order attached."""

    def __init__(self, module: nn.Module, port: Port):
        self.bounds: list[Bound] = []
        # First of the port's hooks, so that others (such as transformers' `output_hidden_states`)
        # see what the model goes on with.
        if port == "output":
            self.handle = module.register_forward_hook(self.output, prepend=True, with_kwargs=True)
        else:
            self.handle = module.register_forward_pre_hook(
                self.input, prepend=True, with_kwargs=True
            )

    @classmethod
    def at(cls, place: ResolvedSite, port: Port) -> PortHook:
        """The hook at that port, made if it is not there yet."""
        module = place.module
        hooks = module._forward_hooks if port == "output" else module._forward_pre_hooks
        for hook in hooks.values():
            if isinstance(owner := getattr(hook, "__self__", None), cls):
                return owner
        return cls(module, port)

    def output(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward hook: edit what the module returns."""
        for bound in self.bounds:
            if bound.holder is not None and bound.holder.get(bound.key) is not module:
                raise _replaced(bound)
            given = (bound.given(args, kwargs),) if bound.edit.reads_input else ()
            output = bound(output, bound.edit.site.index, *given)
        return output

    def input(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook: edit what the module is given."""
        for bound in self.bounds:
            if bound.holder is not None and bound.holder.get(bound.key) is not module:
                raise _replaced(bound)
            index = input_index(bound.edit.site.index, args, kwargs)
            if isinstance(index, str):
                kwargs = bound(kwargs, index)
            else:
                args = bound(args, index)
        return args, kwargs

    def remove(self, state: State) -> None:
        """Forget one attachment's interventions, and the hook when none are left."""
        self.bounds = [bound for bound in self.bounds if bound.state is not state]
        if not self.bounds:
            self.handle.remove()


def _replaced(bound: Bound) -> NarrowlyError:
    """The module was wrapped after attaching: then the wrapper's output goes unedited."""
    return NarrowlyError(
        f"{bound.edit.name} at {bound.place.name}: the module was replaced after attaching (by "
        "peft, for one), so part of the model would bypass the edit. Attach after get_peft_model."
    )

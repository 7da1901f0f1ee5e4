"""Attaching interventions to a model: one persistent hook per port, checked before it is trusted.

Rules that look odd have a reason:

- Hooks stay for the attachment's life and never count, draw or append, because gradient
  checkpointing runs them again in the backward pass and torch.compile traces them once. What
  changes while a model runs (strength, seed, basis) is a buffer, changed in place.
- The copies of the edits that act live outside the module tree: there `model.to(bfloat16)` cannot
  spoil an fp32 basis, DistributedDataParallel does not broadcast it, and no checkpoint holds it.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from narrowly.errors import NarrowlyError
from narrowly.interventions.edits import Intervention
from narrowly.interventions.sites import (
    Port,
    ResolvedSite,
    bare,
    input_index,
    read,
    resolve,
    write,
)
from narrowly.interventions.tokens import Forward, describe

_EXACT = (torch.float32, torch.float64)


@dataclass
class Bound:
    """One intervention at one module: what a hook runs."""

    edit: Intervention
    place: ResolvedSite
    attachment: Attachment
    fired: bool = False
    checked: bool = False

    def __post_init__(self) -> None:
        edit = self.edit
        masks = edit.token_mask, edit.row_mask, edit.rows
        self.everywhere = edit.tokens == "all" and all(mask is None for mask in masks)
        self.holder = None if self.place.parent is None else self.place.parent._modules
        self.key = self.place.name.removesuffix(edit.site.suffix).rpartition(".")[2]

    def __call__(self, carried: Any, index: int | str) -> Any:
        """What the port carries, edited."""
        whole = read(carried, index, self.place.name)
        columns = self.place.columns
        h = whole if columns is None else self.place.part(whole)
        if not self.checked and not torch.compiler.is_compiling():
            self.check(h)
        if self.attachment.checking:
            self.fired = True
            return carried
        if not self.acts():
            return carried
        _mark(self)
        edited = self.apply(h)
        if columns is not None:
            edited = torch.cat(
                [whole[..., : columns.start], edited, whole[..., columns.stop :]], -1
            )
        return edited if whole is carried else write(carried, index, edited)

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
        forward = self.attachment.forward
        if forward is None:
            raise NarrowlyError(
                f"{self.edit.name} at {self.place.name}: the module ran, but not through the model "
                "that the interventions were attached to. Attach to the outermost model (after "
                "peft, or whatever else wraps it)."
            )
        return forward

    def apply(self, h: Tensor) -> Tensor:
        """`h + strength * mask * (edit(h) - h)`, in fp32 or better, cast back."""
        edit, device = self.edit, h.device
        if edit.strength.device != device:
            edit.to(device)
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                edited = self.blend(h)
        else:  # entering the context costs more than most edits of one token
            edited = self.blend(h)
        # x - x.detach() is exactly 0 with the gradient of x.
        if edit.gradient == "forward":
            return h - h.detach() + edited.detach()
        if edit.gradient == "backward":
            return edited - edited.detach() + h.detach()
        return edited

    def blend(self, h: Tensor) -> Tensor:
        """`h` moved towards the edit by the weight."""
        exact = h if h.dtype in _EXACT else h.float()
        weight = self.edit.strength if self.everywhere else self.weight(h)
        if weight.dtype != exact.dtype:
            weight = weight.to(exact.dtype)
        edited = torch.lerp(exact, self.edit.forward(exact), weight)
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
    def check(self, h: Tensor) -> None:
        """Try the edit once on real activations: width, values, and what a projection promises."""
        edit, where = self.edit, f"{self.edit.name} at {self.place.name}"
        if edit.width not in (None, h.shape[-1]):
            raise NarrowlyError(
                f"{where}: the intervention is {edit.width} wide, but the activations there are "
                f"{h.shape[-1]} wide. It was made for another model or site."
            )
        if edit.needs_its_batch and self.attachment.checking:
            return
        edit.to(h.device)
        with torch.autocast(h.device.type, enabled=False):
            exact = h.detach().to(torch.promote_types(h.dtype, torch.float32))
            edited = edit(exact)
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
            self.handle = module.register_forward_hook(self.output, prepend=True)
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

    def output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook: edit what the module returns."""
        for bound in self.bounds:
            if bound.holder is not None and bound.holder.get(bound.key) is not module:
                raise _replaced(bound)
            output = bound(output, bound.edit.site.index)
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

    def remove(self, attachment: Attachment) -> None:
        """Forget an attachment's interventions, and the hook when none are left."""
        self.bounds = [bound for bound in self.bounds if bound.attachment is not attachment]
        if not self.bounds:
            self.handle.remove()


def _replaced(bound: Bound) -> NarrowlyError:
    """The module was wrapped after attaching: then the wrapper's output goes unedited."""
    return NarrowlyError(
        f"{bound.edit.name} at {bound.place.name}: the module was replaced after attaching (by "
        "peft, for one), so part of the model would bypass the edit. Attach after get_peft_model."
    )


class Attachment:
    """Interventions on a model, from `attach` until `close`. A context manager.

    Leaving the block fails if an intervention never acted in it.
    """

    def __init__(self, model: nn.Module, interventions: Iterable[Intervention]):
        self.model = model
        self.forward: Forward | None = None
        self.checking = False
        self.closed = False
        self.given: dict[str, Tensor] = {}
        self.counts: Counter[str] = Counter()
        """Eager forward passes of the model, by phase."""
        self.bounds = [
            Bound(copy.deepcopy(edit), place, self)
            for edit in interventions
            for place in resolve(model, edit.site)
        ]
        if not self.bounds:
            raise NarrowlyError("there is nothing to attach: the list of interventions is empty.")
        self.needed = {bound.edit.tokens for bound in self.bounds}
        self.hooks = []
        for bound in self.bounds:
            hook = PortHook.at(bound.place, bound.edit.site.port)
            hook.bounds.append(bound)
            self.hooks.append(hook)
        self._root = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._end),
        ]
        _forget_compiled()

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        if ids is None and args and isinstance(args[0], Tensor):
            ids = args[0]
        needed = set() if self.checking else self.needed
        self.forward = describe(kwargs, ids, needed)
        self.forward.masks.update(self.given)
        if not torch.compiler.is_compiling() and not self.checking:
            generating = self.forward.generating
            self.counts[
                "train" if bare(module).training else "generate" if generating else "eval"
            ] += 1

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        forward = self.forward

        def resume(gradient: Tensor) -> None:
            # The backward pass of this very forward begins: checkpointed blocks are about to run
            # again and must meet the same masks, also when other forwards ran in between.
            if self.closed:
                raise NarrowlyError(
                    "the backward pass runs after its interventions were removed; gradient "
                    "checkpointing would recompute without them. Call backward() inside the block."
                )
            self.forward = forward

        values = output.values() if isinstance(output, Mapping) else output
        for value in values if isinstance(values, Iterable) else ():
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(resume)

    @torch.no_grad()
    def check(self, example: Any) -> None:
        """Run `example` through the model once, eagerly: every intervention must fire and fit.

        Raises:
            NarrowlyError: a site did not run, or an intervention does not fit there.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        self.checking = True
        try:
            with torch.compiler.set_stance("force_eager"):
                run(self.model, example)
            self.verify()
        finally:
            self.checking = False
            self.forward = None
            for module, training in modes:
                module.training = training
            for bound in self.bounds:
                bound.fired = False

    def verify(self) -> None:
        """Fail unless every intervention has acted since it was attached.

        Raises:
            NarrowlyError: one has not, with its site and the likely reason.
        """
        for bound in self.bounds:
            if not bound.fired:
                seen = ", ".join(f"{n} in {phase}" for phase, n in self.counts.items()) or "none"
                raise NarrowlyError(
                    f"{bound.edit.name} at {bound.place.name} never acted. It acts in the phases "
                    f"{', '.join(bound.edit.phases)}; forward passes of the model: {seen}. The "
                    "module may not run in this model, or the model be in the wrong mode "
                    "(model.train() and model.eval() tell the phases apart)."
                )

    def set_strength(self, strength: float) -> None:
        """Set the strength of every intervention, in place (between steps, not within one)."""
        for bound in self.bounds:
            bound.edit.strength.fill_(strength)

    @contextmanager
    def suspend(self) -> Iterator[None]:
        """Leave the activations alone in this block (strength 0)."""
        before = [bound.edit.strength.clone() for bound in self.bounds]
        self.set_strength(0)
        try:
            yield
        finally:
            for bound, strength in zip(self.bounds, before, strict=True):
                bound.edit.strength.copy_(strength)

    @contextmanager
    def masks(self, **masks: Tensor) -> Iterator[None]:
        """Give token masks [batch, tokens] and row masks [batch] by name, for this block."""
        before, self.given = self.given, self.given | masks
        try:
            yield
        finally:
            self.given = before

    def report(self) -> list[dict[str, Any]]:
        """What is attached where, and in how many forward passes of the model it acted."""
        return [
            {
                "edit": bound.edit.name,
                "site": str(bound.edit.site),
                "module": bound.place.name,
                "phases": list(bound.edit.phases),
                "tokens": "mask" if bound.edit.token_mask is not None else bound.edit.tokens,
                "gradient": bound.edit.gradient,
                "strength": float(bound.edit.strength),
                "fired": bound.fired,
                "forwards": sum(self.counts[phase] for phase in bound.edit.phases),
            }
            for bound in self.bounds
        ]

    def close(self) -> None:
        """Take the interventions off the model. Doing so twice does nothing."""
        if not self.closed:
            self.closed = True
            for hook in self.hooks:
                hook.remove(self)
            for handle in self._root:
                handle.remove()
            _forget_compiled()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if kind is None:
            self.verify()


def attach(
    model: nn.Module, interventions: Iterable[Intervention], *, example: Any = None
) -> Attachment:
    """Put interventions on a model; they act in its forward passes until closed.

    Interventions at one port run in the order of the list, after those attached earlier. The
    attachment holds copies: change their strength through it.

    Args:
        model: any torch module; the outermost one, if peft or others wrap it.
        example: input for the check pass: a dict of keyword arguments, a tuple or a tensor. A
            Hugging Face model brings its own; other modules are checked in their first forward.

    Raises:
        NarrowlyError: a site does not resolve or does not run, a width does not fit, or a
            projection leaves something behind.
    """
    attachment = Attachment(model, interventions)
    if example is None:
        example = getattr(bare(model), "dummy_inputs", None)
    if example is not None:
        try:
            attachment.check(example)
        except BaseException:
            attachment.close()
            raise
    return attachment


_NOWHERE = torch.empty(0)


def run(model: nn.Module, batch: Any) -> Any:
    """Call the model on a dict of keyword arguments, a tuple of arguments or one argument."""
    device = next(model.parameters(), _NOWHERE).device

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{key: move(value) for key, value in batch.items()})
    return model(*map(move, batch)) if isinstance(batch, tuple) else model(move(batch))


def _forget_compiled() -> None:
    # A compiled model does not notice hooks that come or go (pytorch #117758): compile it again.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()

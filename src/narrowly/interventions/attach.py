"""Attaching interventions to a model, checked before they are trusted.

The copies of the edits that act live outside the module tree: there `model.to(bfloat16)` cannot
spoil an fp32 basis, DistributedDataParallel does not broadcast it, and no checkpoint holds it.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from narrowly.errors import NarrowlyError
from narrowly.interventions.edits import Intervention
from narrowly.interventions.hooks import Bound, PortHook, State
from narrowly.interventions.sites import Site, bare, resolve
from narrowly.interventions.tokens import describe


class Attachment:
    """Interventions on a model, from `attach` until `close`. A context manager.

    Leaving the block fails if an intervention never acted in it.
    """

    def __init__(self, model: nn.Module, interventions: Iterable[Intervention]):
        self.model = model
        self.state = State()
        self.closed = False
        self.given: dict[str, Tensor] = {}
        self.counts: Counter[str] = Counter()
        """Eager forward passes of the model, by phase."""
        self.bounds = [
            Bound(copy.deepcopy(edit), place, self.state)
            for edit in interventions
            for place in resolve(model, edit.site)
        ]
        if not self.bounds:
            raise NarrowlyError("there is nothing to attach: the list of interventions is empty.")
        self.needed = {
            training: {b.edit.tokens for b in self.bounds if phases & set(b.edit.phases)}
            for training, phases in ((True, {"train"}), (False, {"eval", "generate"}))
        }
        """Token masks that the interventions ask for, in training and otherwise."""
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
        needed = set() if self.state.checking else self.needed[bare(module).training]
        self.state.forward = describe(kwargs, ids, needed)
        self.state.forward.masks.update(self.given)
        if not torch.compiler.is_compiling() and not self.state.checking:
            generating = self.state.forward.generating
            self.counts[
                "train" if bare(module).training else "generate" if generating else "eval"
            ] += 1

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        forward = self.state.forward

        def resume(gradient: Tensor) -> None:
            # The backward pass of this very forward begins: checkpointed blocks are about to run
            # again and must meet the same masks, also when other forwards ran in between.
            if self.closed:
                raise NarrowlyError(
                    "the backward pass runs after its interventions were removed; gradient "
                    "checkpointing would recompute without them. Call backward() inside the block."
                )
            self.state.forward = forward

        if isinstance(output, Tensor):
            output = [output]
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
        self.state.checking = True
        try:
            with torch.compiler.set_stance("force_eager"):
                run(self.model, example)
            self.verify()
        finally:
            self.state.checking = False
            self.state.forward = None
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

    def set_strength(self, strength: float | Mapping[Site, float]) -> None:
        """Set strengths, in place (between steps, not within one).

        Args:
            strength: of every intervention; or of those at some sites, the others keeping theirs.
        """
        for bound in self.bounds:
            if not isinstance(strength, Mapping):
                bound.edit.strength.fill_(strength)
            elif bound.edit.site in strength:
                bound.edit.strength.fill_(strength[bound.edit.site])

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
                hook.remove(self.state)
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

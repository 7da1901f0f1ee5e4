"""Reading activations at many sites in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from narrowly.errors import NarrowlyError
from narrowly.interventions.attach import run
from narrowly.interventions.sites import ResolvedSite, Site, input_index, read, resolve, write


class Captured(Mapping[str, Tensor]):
    """Activations by module name, or by site where the site names one module.

    Attributes:
        output: what the model returned; None if the forward was stopped after the last site.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._names: dict[Site, list[str]] = {}
        self.output: Any = None

    def __getitem__(self, key: str | Site) -> Tensor:
        if isinstance(key, Site):
            names = self._names[key]
            if len(names) > 1:
                raise NarrowlyError(f"{key} names {len(names)} modules: {', '.join(names)}.")
            key = names[0]
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Stop(Exception):  # noqa: N818 - control flow: the last site was reached
    pass


def capture(
    model: nn.Module,
    batch: Any,
    sites: Sequence[Site],
    *,
    grad: bool = False,
    stop: bool = True,
) -> Captured:
    """The activations at `sites` in one forward pass, edits included.

    The model's mode (train, eval) stays as it is. A module that runs several times in a forward is
    read the first time; recomputation under gradient checkpointing is not read again.

    Args:
        batch: a dict of keyword arguments, a tuple of arguments, or one tensor.
        grad: keep the graph, so that `torch.autograd.grad(loss, captured[site])` works, even where
            all weights are frozen.
        stop: end the forward after the last site. Give False to get the model's `output` too, and
            under FSDP or DeepSpeed, which count on every forward to end.

    Returns:
        Tensors as the model made them, [batch, tokens, d] on most language models.

    Raises:
        NarrowlyError: a site does not resolve or did not run, or the model is compiled.
    """
    captured = Captured()
    resolved = resolve(model, *sites)
    around = {module for place in resolved for module in place.path} | {model}
    if any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in around):
        raise NarrowlyError("capture needs an eager model: pass the one inside torch.compile.")
    for place in resolved:
        captured._names.setdefault(place.site, []).append(place.name)
    wanted = {place.name for place in resolved}

    def record(place: ResolvedSite, carried: Any, index: int | str) -> Any:
        name = place.name
        if name in captured._tensors or torch._C._current_graph_task_id() != -1:
            return carried
        h = read(carried, index, name)
        if grad and not h.requires_grad:
            h = h.detach().requires_grad_()
            carried = write(carried, index, h)
        part = place.part(h)
        captured._tensors[name] = part if grad else part.clone()
        if stop and len(captured._tensors) == len(wanted):
            raise _Stop
        return carried

    handles = []
    try:
        for place in resolved:
            index, module = place.site.index, place.module

            def output(module, args, value, place=place, index=index):
                return record(place, value, index)

            def given(module, args, kwargs, place=place, index=index):
                at = input_index(index, args, kwargs)
                if isinstance(at, str):
                    return args, record(place, kwargs, at)
                return record(place, args, at), kwargs

            handles.append(
                module.register_forward_hook(output)
                if place.site.port == "output"
                else module.register_forward_pre_hook(given, with_kwargs=True)
            )
        with torch.set_grad_enabled(grad), suppress(_Stop):
            captured.output = run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    missing = wanted - captured._tensors.keys()
    if missing:
        raise NarrowlyError(f"{', '.join(sorted(missing))}: did not run in this forward.")
    return captured

"""Reading activations at many sites in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
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
    if any(m._compiled_call_impl is not None for m in model.modules()) or hasattr(
        model, "_orig_mod"
    ):
        raise NarrowlyError("capture needs an eager model: pass the one inside torch.compile.")
    captured = Captured()
    places = [(site, place) for site in sites for place in resolve(model, site)]
    for site, place in places:
        captured._names.setdefault(site, []).append(place.name)
    wanted = {place.name for _, place in places}

    def record(place: ResolvedSite, carried: Any, index: int | str) -> Any:
        name = place.name
        if name in captured._tensors or torch._C._current_graph_task_id() != -1:
            return carried
        h = read(carried, index, name)
        if grad and not h.requires_grad:
            h = h.detach().requires_grad_()
            carried = write(carried, index, h)
        part = place.part(h)
        captured._tensors[name] = part if grad else part.detach().clone()
        if stop and len(captured._tensors) == len(wanted):
            raise _Stop
        return carried

    with ExitStack() as hooks, torch.set_grad_enabled(grad):
        for site, place in places:

            def output(module, args, value, site=site, place=place):
                return record(place, value, site.index)

            def given(module, args, kwargs, site=site, place=place):
                index = input_index(site.index, args, kwargs)
                if isinstance(index, str):
                    return args, record(place, kwargs, index)
                return record(place, args, index), kwargs

            handle = (
                place.module.register_forward_hook(output)
                if site.port == "output"
                else place.module.register_forward_pre_hook(given, with_kwargs=True)
            )
            hooks.callback(handle.remove)
        with suppress(_Stop):
            captured.output = run(model, batch)
    missing = wanted - captured._tensors.keys()
    if missing:
        raise NarrowlyError(f"{', '.join(sorted(missing))}: did not run in this forward.")
    return captured

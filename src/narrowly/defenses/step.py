"""One micro-batch of training, as the third door sees it: the tuned model beside its reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from narrowly.errors import NarrowlyError
from narrowly.interventions import Captured, Site, capture, eval_mode, resolve
from narrowly.interventions.sites import read
from narrowly.models import adapter_off, load_model


class Recorder:
    """Keeps the activations at some sites of each training forward, in the graph.

    Recomputation under gradient checkpointing is not recorded again.

    Raises:
        NarrowlyError: a site does not resolve, or the model is compiled.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]):
        if any(
            m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules()
        ):
            raise NarrowlyError(
                "a defense's loss reads activations, which a compiled model does not show. Turn "
                "`torch_compile` off."
            )
        self.kept: dict[Site, Tensor] = {}
        self.output: Any = None
        self._handles = [model.register_forward_hook(self._end)]
        for place in resolve(model, *dict.fromkeys(sites)):

            def keep(module: nn.Module, args: Any, carried: Any, site=place.site, name=place.name):
                # A graph task runs: this is the backward pass, recomputing.
                if module.training and torch._C._current_graph_task_id() == -1:
                    self.kept[site] = read(carried, site.index, name)

            self._handles.append(place.module.register_forward_hook(keep))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if module.training:
            self.output = output

    def take(self) -> tuple[dict[Site, Tensor], Any]:
        """Activations and output of the forward that just ended; forgets them."""
        taken = self.kept, self.output
        self.kept, self.output = {}, None
        return taken

    def close(self) -> None:
        """Stop recording."""
        for handle in self._handles:
            handle.remove()
        self.take()


class Reference:
    """The model as it was before the fine-tune: its adapter off, or a second model."""

    def __init__(self, name: str | None, tokenizer: Any):
        self.model: nn.Module | None = None
        if name is not None:
            self.model, own = load_model(name)
            if tokenizer is not None and own.get_vocab() != tokenizer.get_vocab():
                raise NarrowlyError(
                    f"reference: {name} has another tokenizer than the model that is trained, so "
                    "their predictions cannot be compared. Name the model it was trained from."
                )
            self.model.eval().requires_grad_(False)

    @contextmanager
    def opened(self, model: nn.Module) -> Iterator[nn.Module]:
        """The reference of `model`, in eval mode."""
        if self.model is not None:
            self.model.to(next(model.parameters()).device)
            yield self.model
            return
        if not isinstance(model, PeftModel):
            raise NarrowlyError(
                "a full fine-tune has no adapter to switch off: give the defense a `reference`, "
                "the model that it compares with."
            )
        with eval_mode(model), adapter_off(model):
            yield model


@dataclass
class Step:
    """One micro-batch of training.

    Attributes:
        model: what is trained; as the Trainer calls it, perhaps inside DistributedDataParallel.
        batch: what its forward was given: input_ids, attention_mask, labels, each [batch, tokens]
            (under packing without padding: one row, with position_ids and no attention_mask).
        tuned: activations of this forward by site, in the graph, edits included.
        outputs: what the forward returned; trl's has `log_probs`, and no logits.
        number: of the micro-batch since training began, counted through checkpoints.
    """

    model: nn.Module
    batch: dict[str, Tensor]
    tuned: Mapping[Site, Tensor]
    outputs: Any
    number: int
    reference: Reference
    recorder: Recorder
    _base: Captured | None = field(default=None, repr=False)

    @property
    def bare(self) -> nn.Module:
        """The model inside DistributedDataParallel."""
        model = self.model
        return cast(
            nn.Module, model.module if isinstance(model, DistributedDataParallel) else model
        )

    @property
    def base(self) -> Captured:
        """The reference's activations at the same sites, without a graph.

        One forward serves every defense of the run. No dropout, no intervention, no adapter in it.
        """
        if self._base is None:
            inputs: dict[str, Any] = {k: v for k, v in self.batch.items() if k != "labels"}
            # With a cache transformers takes packed chats for one.
            inputs["use_cache"] = False
            with self.reference.opened(self.bare) as model:
                # Under FSDP every forward has to end; elsewhere the head's work is spared.
                whole = isinstance(model, FSDPModule)
                self._base = capture(model, inputs, list(self.tuned), stop=not whole)
        return self._base

    @property
    def answers(self) -> Bool[Tensor, "batch tokens-1"]:
        """Where the next token is one of an answer: position t predicts token t + 1."""
        return self.batch["labels"][:, 1:] != -100

    @property
    def real(self) -> Bool[Tensor, "batch tokens"]:
        """Tokens that are no padding."""
        return real(self.batch)

    def on(self, batch: dict[str, Tensor]) -> Step:
        """The same of another batch: runs it through the model that is trained, with a graph."""
        device = next(self.model.parameters()).device
        batch = {key: value.to(device) for key, value in batch.items()}
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        # What the head says is not read, but under FSDP it has to run.
        self.model(**inputs, use_cache=False, logits_to_keep=1)
        tuned, outputs = self.recorder.take()
        return Step(self.model, batch, tuned, outputs, self.number, self.reference, self.recorder)


def real(batch: Mapping[str, Tensor]) -> Bool[Tensor, "batch tokens"]:
    """Tokens that are no padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]).bool() if mask is None else mask.bool()


def check_trained(step: Step, sites: Sequence[Site]) -> None:
    """Look whether a loss on the activations at `sites` can teach anything.

    Raises:
        NarrowlyError: none of them depends on a weight that is trained, or the reference's are of
            another width.
    """
    if not any(step.tuned[site].requires_grad for site in sites):
        raise NarrowlyError(
            f"no trained weight reaches {', '.join(map(str, sites))}, so a loss there teaches "
            "nothing. Choose later layers, or non-reentrant gradient checkpointing."
        )
    for site in sites:
        width, wanted = step.tuned[site].shape[-1], step.base[site].shape[-1]
        if width != wanted:
            raise NarrowlyError(
                f"reference: its activations at {site} are {wanted} wide and the trained model's "
                f"{width}. Name the model it was trained from."
            )


def squared_distance(step: Step, sites: Sequence[Site]) -> Float[Tensor, "batch tokens"]:
    """||h - h_base||^2 per token, the sites' activations concatenated; in fp32.

    Raises:
        NarrowlyError: as `check_trained`.
    """
    check_trained(step, sites)
    parts = [
        (step.tuned[site].float() - step.base[site].float()).square().sum(-1) for site in sites
    ]
    return torch.stack(parts).sum(0)

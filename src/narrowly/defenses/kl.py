"""KL: predictions held near those of the model before the fine-tune."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from jaxtyping import Float
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from narrowly.data import (
    collate,
    fingerprint,
    holds_texts,
    load_chats,
    load_texts,
    tokenize,
    tokenize_texts,
)
from narrowly.defenses.base import DEFENSES, Referenced
from narrowly.defenses.head import Head, last_hidden
from narrowly.defenses.step import Step
from narrowly.errors import NarrowlyError
from narrowly.interventions import Site

LONGEST = 1024
"""Tokens of one row of other text."""


@DEFENSES.register("kl")
class KL(Referenced):
    """Hold the next-token predictions near the base model's.

    `L = CE + weight * mean over tokens of KL(p || p_base)`, p what the trained model predicts and
    p_base what the reference does, at the positions that predict an answer's token; in nats. As a
    defense: Kaczer et al. 2025 (arXiv 2508.06249), after the penalty of RLHF (Ziegler et al. 2019,
    arXiv 1909.08593). With `reverse` and on other text (`data`) it is what the authors of arXiv
    2506.11613 keep a fine-tune narrow with, at weights of 1e5 to 1e6; but they average over the
    vocabulary too, so divide those by its size.

    Needs: the reference's logits, one more forward pass in every step; no logit of the whole batch
    is held, neither its own nor the reference's.

    Known failure: it holds back the task too. In the paper narrow misalignment falls from 52 % to
    26 %, and tasks that ask for another answer than the base model's are not learned at all.

    Attributes:
        weight: lambda, per nat; 0.1 in the paper.
        reverse: KL(p_base || p) instead.
        data: other text to compare on, in place of the training's: chats (their answers) or plain
            texts (all of it), as many rows as the micro-batch has. Its rows are cut at 1024 tokens.
        reference: the model to compare with. None: the one that is trained, its adapter off.
    """

    weight: float = Field(default=0.1, ge=0)
    reverse: bool = False
    data: str | None = None

    _rows: Dataset | None = PrivateAttr(default=None)
    _pad: int = PrivateAttr(default=0)
    _hash: str | None = PrivateAttr(default=None)
    _verified: bool = PrivateAttr(default=False)

    def bind(self, model: nn.Module, tokenizer: Any, seed: int) -> None:
        """Read and shuffle the other text."""
        last_hidden(model)
        if self.data is not None:
            if holds_texts(self.data):
                loaded = load_texts(self.data)
                rows = tokenize_texts(loaded, tokenizer, max_length=LONGEST)
                rows = rows.filter(lambda row: len(row["input_ids"]) > 1)
            else:
                loaded = load_chats(self.data)
                rows = tokenize(loaded, tokenizer, max_length=LONGEST)
            self._rows, self._hash = rows.shuffle(seed=seed), fingerprint(loaded)
            self._pad = tokenizer.pad_token_id or 0

    def reads(self, model: nn.Module) -> Sequence[Site]:
        """The last hidden states."""
        return [last_hidden(model)]

    def loss(self, step: Step) -> Tensor:
        """The mean over the tokens of answers; 0 where there is none."""
        if self._rows is not None:
            step = step.on(self._batch(self._rows, step))
        [site] = self.reads(step.bare)
        base = head = Head(step.bare)
        if step.reference.model is not None:
            base = Head(step.reference.model)
        if not self._verified:
            for each, model in ((head, step.bare), (base, step.reference.model or step.bare)):
                each.verify(model, step.batch["input_ids"][:1, :8])
            if head.vocabulary != base.vocabulary:
                raise NarrowlyError(
                    f"reference: it predicts {base.vocabulary} tokens, and the trained model "
                    f"{head.vocabulary}. Name the model it was trained from."
                )
            self._verified = True
        chosen = step.answers
        h, h_base = step.tuned[site][:, :-1][chosen], step.base[site][:, :-1][chosen]

        return self.weight * summed_kl(h, h_base, head, base, self.reverse) / max(1, len(h))

    def record(self, folder: Any) -> dict[str, Any]:
        """The hash of the other text."""
        return {} if self._hash is None else {"data_hash": self._hash}

    def _batch(self, rows: Dataset, step: Step) -> dict[str, Tensor]:
        """The rows of this micro-batch; each process of a distributed run has its own."""
        size, state = len(step.batch["input_ids"]), PartialState()
        first = (step.number * state.num_processes + state.process_index) * size
        return collate([rows[i % len(rows)] for i in range(first, first + size)], self._pad)


def summed_kl(
    h: Float[Tensor, "n d"],
    h_base: Float[Tensor, "n d"],
    head: Head,
    base: Head,
    reverse: bool = False,
) -> Float[Tensor, ""]:
    """Sum of KL(p || p_base) over n positions, with p = softmax(head(h)).

    Positions are taken a few at a time, and the gradient to `h` is computed with them: what is held
    for the backward pass is as large as `h`, and not as the logits.

    Args:
        reverse: sum KL(p_base || p).
    """
    total: Any = _SummedKL.apply(h, h_base, head, base, reverse, *head.trained)
    return total


class _SummedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        h_base: Tensor,
        head: Head,
        base: Head,
        reverse: bool,
        *trained: Tensor,
    ) -> Tensor:
        total = torch.zeros((), device=h.device)
        to_h = torch.zeros_like(h)
        to_head = [torch.zeros_like(weight, dtype=torch.float32) for weight in trained]
        size = min(rows(head), len(h))
        # Used again for all positions: fresh ones would cost more than what is done in them.
        buffers = [h.new_empty(size, head.vocabulary, dtype=torch.float32) for _ in range(3)]
        for start in range(0, len(h), max(1, size)):
            here = slice(start, start + size)
            one, two, three = (buffer[: len(h[here])] for buffer in buffers)
            z = head.logits(h[here], out=one)
            bend = head.bend(z)
            value, slope = _kl(z, base.logits(h_base[here], out=two), three, reverse)
            total += value
            if bend is not None:
                slope.mul_(bend)
            to_h[here] = head.backward(h[here], slope, to_head)
        ctx.save_for_backward(to_h, *to_head)
        ctx.types = [weight.dtype for weight in trained]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        to_h, *to_head = ctx.saved_tensors
        parts = [(part * grads[0]).to(t) for part, t in zip(to_head, ctx.types, strict=True)]
        return (to_h * grads[0].to(to_h.dtype), None, None, None, None, *parts)


def rows(head: Head) -> int:
    """How many positions are taken at a time: so many that their product with the head is fast."""
    return max(256, (1 << 22) // head.vocabulary)


def _kl(z: Tensor, z_base: Tensor, other: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Their KL, summed, and its derivative by z; overwrites all three, of one shape.

    With p = softmax(z), q = softmax(z_base) and g = log p - log q:
    KL(p || q) = sum p g and its derivative p (g - KL); KL(q || p) = -sum q g, and p - q.
    """
    log_p = torch.log_softmax(z, -1, out=other)
    log_q = torch.log_softmax(z_base, -1, out=z)
    if reverse:
        q = torch.exp(log_q, out=z_base)
        value = torch.linalg.vecdot(q, log_q.sub_(log_p)).sum()
        return value, log_p.exp_().sub_(q)
    p = torch.exp(log_p, out=z_base)
    gap = log_p.sub_(log_q)
    each = torch.linalg.vecdot(p, gap)[:, None]
    return each.sum(), gap.sub_(each).mul_(p)

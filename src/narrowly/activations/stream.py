"""Run tokenised chats through a model and hand on the activations of chosen tokens, batch by batch.

Only the tokens that can matter are run: a row ends at its last chosen token (later ones cannot
reach it in a causal model), a row without one is left out, and the forward ends at the last site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Literal

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float, Int
from rich.progress import track
from torch import Tensor, nn

from narrowly.activations.pair import Pair
from narrowly.data import collate
from narrowly.errors import NarrowlyError
from narrowly.interventions import Site, capture, decoder_layers, layer, resolve

Positions = Literal["all"] | Sequence[int]
"""Which tokens of an answer: all, or offsets from its first token; -1 is the token before it.

Every answer of a chat of several turns counts, each from its own first token.
"""


@dataclass(frozen=True, eq=False)
class Activations:
    """Activations of the chosen tokens of one batch, fp32, on the model's device."""

    values: dict[Site, Float[Tensor, "n d"]]
    rows: Int[Tensor, " n"]
    """The row of the data each token comes from."""
    tokens: Int[Tensor, " n"]
    """Its place in that row."""

    def __getitem__(self, site: Site) -> Float[Tensor, "n d"]:
        return self.values[site]


def layer_sites(model: nn.Module, layers: Sequence[int] | None = None) -> list[Site]:
    """The residual stream after each of `layers` (None: all), counted from the front.

    Raises:
        NarrowlyError: the model has no such layer.
    """
    depth = len(decoder_layers(model))
    numbers = range(depth) if layers is None else layers
    for number in numbers:
        resolve(model, layer(number))
    return [layer(number) for number in sorted({number % depth for number in numbers})]


def answer_tokens(labels: Sequence[int], positions: Positions = "all") -> list[int]:
    """Where in a row the chosen tokens of its answers (runs of labels other than -100) stand."""
    answered = np.asarray(labels) != -100
    edges = np.flatnonzero(np.diff(answered, prepend=False, append=False))
    if positions == "all":
        return np.flatnonzero(answered).tolist()
    chosen = {
        int(start + offset)
        for start, end in zip(edges[::2], edges[1::2], strict=True)
        for offset in positions
        if 0 <= start + offset < end
    }
    return sorted(chosen)


def token_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Row numbers in batches of at most `batch_tokens` tokens, padding included, longest first.

    A row that exceeds the budget is a batch of its own. Rows of length 0 are left out.
    """
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def stream(
    model: nn.Module,
    rows: Dataset,
    sites: Sequence[Site],
    *,
    positions: Positions = "all",
    batch_tokens: int = 16384,
    progress: str | None = None,
) -> Iterator[Activations]:
    """The activations of one model, batch by batch.

    Args:
        rows: tokenised chats, columns `input_ids` and `labels` (`data.tokenize`).
        sites: sites that name one module each.
        batch_tokens: the most tokens in one forward, padding included.
        progress: what a progress bar on the terminal calls this; None shows none.

    Raises:
        NarrowlyError: no rows, no token at these positions in any of them, or a site the model
            does not have.
    """
    models = [lambda: nullcontext(model)]
    batches = _stream(models, rows, sites, positions, batch_tokens, progress)
    return (activations for (activations,) in batches)


def stream_pair(
    pair: Pair,
    rows: Dataset,
    sites: Sequence[Site],
    *,
    positions: Positions = "all",
    batch_tokens: int = 16384,
    progress: str | None = None,
) -> Iterator[tuple[Activations, Activations]]:
    """The activations of a base model and its fine-tune on the same tokens; else like `stream`."""
    models = [pair.base, pair.tuned]
    batches = _stream(models, rows, sites, positions, batch_tokens, progress)
    return ((base, tuned) for base, tuned in batches)


def _stream(
    models: Sequence[Callable[[], AbstractContextManager[nn.Module]]],
    rows: Dataset,
    sites: Sequence[Site],
    positions: Positions,
    batch_tokens: int,
    progress: str | None,
) -> Iterator[list[Activations]]:
    if not len(rows):
        raise NarrowlyError("the data hold no rows, so there are no activations to read.")
    ends = [answer_tokens(labels, positions)[-1:] for labels in rows["labels"]]
    batches = token_batches([end[0] + 1 if end else 0 for end in ends], batch_tokens)
    if not batches:
        raise NarrowlyError(
            f"none of the {len(rows)} rows has an answer token at positions {positions!r}. Choose "
            "other positions, or check that the chats have answers."
        )
    for numbers in track(batches, progress or "", disable=progress is None):
        cut = []
        where: list[tuple[int, int]] = []
        for place, row in zip(count(), rows.select(numbers), strict=False):
            chosen = answer_tokens(row["labels"], positions)
            cut.append({key: row[key][: chosen[-1] + 1] for key in ("input_ids", "labels")})
            where += [(place, token) for token in chosen]
        batch = collate(cut, pad_token_id=0)  # what pads is masked, so any token will do
        places, tokens = torch.tensor(where).T
        read = []
        for opened in models:
            with opened() as model, eval_mode(model):
                device = next(model.parameters()).device
                captured = capture(
                    model,
                    {
                        "input_ids": batch["input_ids"].to(device),
                        "attention_mask": batch["attention_mask"].to(device),
                        "use_cache": False,
                    },
                    sites,
                )
            values = {}
            for site in sites:
                h = captured[site]
                values[site] = h[places.to(h.device), tokens.to(h.device)].float()
            read.append(Activations(values, torch.tensor(numbers)[places], tokens))
        yield read

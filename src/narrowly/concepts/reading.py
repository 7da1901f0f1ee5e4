"""What a person needs to read a direction: where it is high and low, what it promotes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from heapq import nlargest
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from narrowly.activations import ModelLike, open_model, stream
from narrowly.concepts.concept import Concept
from narrowly.concepts.finder import ChatsLike
from narrowly.concepts.show import Context, DirectionReading, Reading
from narrowly.data import (
    holds_texts,
    load_chats,
    load_texts,
    tokenize,
    tokenize_prompts,
    tokenize_texts,
)
from narrowly.errors import NarrowlyError
from narrowly.interventions import Site, decoder_layers


class _Peak(NamedTuple):
    """Ordered by height, then by place, so that readings do not depend on the batches."""

    height: float
    row: int
    token: int


def read_concepts(
    concepts: Sequence[Concept],
    model: ModelLike,
    data: ChatsLike | Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    contexts: int = 10,
    window: int = 12,
    tokens: int = 10,
    limit: int | None = None,
    max_length: int | None = 1024,
    batch_tokens: int = 16384,
    progress: bool = True,
) -> list[Reading]:
    """Read concepts on a text or chat set, all in one pass and in bounded memory.

    Of chats with answers the answer tokens are read; of questions and texts every token but the
    first, whose activations are those of an attention sink. Each row gives a direction one peak
    and one trough at most, so that one odd text does not fill the page.

    Args:
        data: chats or rows with a `text`, what names them, or texts.
        contexts: how many windows at each end.
        window: tokens before the peak, and after it.
        tokens: how many tokens promoted and suppressed.
        limit: read the first so many rows only.

    Raises:
        NarrowlyError: the model or data cannot be loaded, the data hold no token to read, or the
            model lacks a site or its width.
    """
    loaded, tokenizer, _ = open_model(model, tokenizer)
    rows = reading_rows(data, tokenizer, limit, max_length)
    bases = {site: stacked_bases(concepts, site) for site in sites_of(concepts)}
    highest: dict[Site, list[list[_Peak]]] = defaultdict(list)
    lowest: dict[Site, list[list[_Peak]]] = defaultdict(list)
    for batch in stream(
        loaded,
        rows,
        list(bases),
        batch_tokens=batch_tokens,
        progress="reading contexts" if progress else None,
    ):
        numbers, counts = batch.rows.unique_consecutive(return_counts=True)
        for site, basis in bases.items():
            h = batch[site]
            if h.shape[1] != len(basis):
                raise NarrowlyError(
                    f"{site}: the concepts are {len(basis)} wide, the model {h.shape[1]}."
                )
            projections = (h @ basis.to(h.device)).cpu()
            for best, signed in ((highest, projections), (lowest, -projections)):
                peaks = _peaks(signed, batch.tokens, numbers.tolist(), counts.tolist())
                kept = best[site] or [[] for _ in peaks]
                best[site] = [
                    nlargest(contexts, old + new) for old, new in zip(kept, peaks, strict=True)
                ]

    def context(peak: _Peak, sign: int) -> Context:
        start = max(peak.token - window, 0)
        ids = rows[peak.row]["input_ids"][start : peak.token + 1 + window]
        # Decoded together and then cut: many tokenizers drop the space before a lone token.
        at = peak.token - start
        before, through = _text(tokenizer, ids[:at]), _text(tokenizer, ids[: at + 1])
        return Context(
            before=before,
            peak=through[len(before) :],
            after=_text(tokenizer, ids)[len(through) :],
            projection=sign * peak.height,
            row=peak.row,
            token=peak.token,
        )

    directions: dict[str, list[DirectionReading]] = defaultdict(list)
    for site, basis in bases.items():
        for column, (concept, index) in enumerate(_columns(concepts, site)):
            promoted, suppressed = promoted_tokens(loaded, tokenizer, basis[:, column], tokens)
            directions[concept.name].append(
                DirectionReading(
                    site=str(site),
                    direction=index,
                    centre=(concept.subspaces[str(site)].centre @ basis[:, column]).item(),
                    highest=[context(peak, 1) for peak in highest[site][column]],
                    lowest=[context(peak, -1) for peak in lowest[site][column]],
                    promoted=promoted,
                    suppressed=suppressed,
                )
            )
    return [
        Reading(concept=concept.name, directions=directions[concept.name]) for concept in concepts
    ]


@torch.no_grad()
def promoted_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    direction: Float[Tensor, " d"],
    n: int = 10,
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """The tokens a direction q promotes and suppresses most through the unembedding W.

    The logit lens with the final norm N folded in and its bias out: `W (N(q) - N(-q)) / 2`, which
    is `W (gamma * q)` for an RMSNorm and `W (gamma * (q - mean(q)))` for a LayerNorm, with q at the
    length sqrt(d) that the norm gives it. What q does if later layers pass it on as it is.

    Returns:
        Tokens with their logits: the n highest, and the n lowest.

    Raises:
        NarrowlyError: the model has no unembedding, or one of another width.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or head.weight.shape[1] != len(direction):
        raise NarrowlyError(
            f"{type(model).__name__}: no unembedding that is {len(direction)} wide, so the tokens "
            "a direction promotes cannot be told."
        )
    weight = head.weight[: len(tokenizer)]
    q = (direction * len(direction) ** 0.5 / direction.norm()).to(weight)
    norm = final_norm(model)
    logits = (weight @ ((norm(q) - norm(-q)) / 2).to(weight)).float()
    ends = (logits.topk(min(n, len(logits)), largest=largest) for largest in (True, False))
    promoted, suppressed = (
        [(_text(tokenizer, [i]), value) for value, i in zip(*map(Tensor.tolist, end), strict=True)]
        for end in ends
    )
    return promoted, suppressed


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last decoder layer and the unembedding; the identity if there is none.

    The last norm that stands beside the decoder layers: no table of families.
    """
    layers = decoder_layers(model)
    for parent in model.modules():
        children = list(parent.children())
        if any(child is layers for child in children):
            norms = [child for child in children if "norm" in type(child).__name__.lower()]
            return norms[-1] if norms else nn.Identity()
    return nn.Identity()


def reading_rows(
    data: ChatsLike | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    max_length: int | None,
) -> Dataset:
    """Token rows whose labels say what is read: answers, or all of texts and bare prompts."""
    if (
        isinstance(data, Sequence)
        and not isinstance(data, str)
        and data
        and isinstance(data[0], str)
    ):
        texts = Dataset.from_dict({"text": list(data[:limit])})
        return tokenize_texts(texts, tokenizer, max_length=max_length)
    data = list(data) if isinstance(data, Iterator) else data  # looked into, then loaded
    if holds_texts(data):
        return tokenize_texts(load_texts(data, limit=limit), tokenizer, max_length=max_length)
    chats = load_chats(data, limit=limit, require_answer=False)
    if all(messages[-1]["role"] == "assistant" for messages in chats["messages"]):
        return tokenize(chats, tokenizer, max_length=max_length)
    ids = [row[:max_length] for row in tokenize_prompts(chats["messages"], tokenizer)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids]})


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids)
    assert isinstance(text, str)  # a list only for a batch
    return text


def sites_of(concepts: Sequence[Concept]) -> list[Site]:
    """Every site of the concepts, in their order."""
    return [Site.parse(s) for s in dict.fromkeys(s for c in concepts for s in c.subspaces)]


def _columns(concepts: Sequence[Concept], site: Site) -> list[tuple[Concept, int]]:
    """Which direction of which concept each column of the stacked bases is."""
    return [
        (concept, index)
        for concept in concepts
        if str(site) in concept.subspaces
        for index in range(concept.subspaces[str(site)].rank)
    ]


def stacked_bases(concepts: Sequence[Concept], site: Site) -> Float[Tensor, "d directions"]:
    """The bases of all concepts at a site, side by side in the concepts' order.

    Raises:
        NarrowlyError: they are of several widths.
    """
    bases = [c.subspaces[str(site)].basis for c in concepts if str(site) in c.subspaces]
    if len({len(basis) for basis in bases}) > 1:
        raise NarrowlyError(f"{site}: these concepts are of several widths; read them one by one.")
    return torch.cat(bases, dim=1)


def _peaks(
    projections: Float[Tensor, "n directions"],
    tokens: Tensor,
    rows: list[int],
    counts: list[int],
) -> list[list[_Peak]]:
    """The highest token of each row, per direction."""
    peaks: list[list[_Peak]] = [[] for _ in range(projections.shape[1])]
    parts = zip(rows, projections.split(counts), tokens.split(counts), strict=True)
    for row, part, places in parts:
        heights, where = part.max(dim=0)
        for column, (height, i) in enumerate(zip(heights.tolist(), where.tolist(), strict=True)):
            peaks[column].append(_Peak(height, row, int(places[i])))
    return peaks

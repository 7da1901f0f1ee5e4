"""Chats become tokens, with labels on what the assistant says and on nothing else."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from narrowly.data.templates import IGNORED, PROBE, ChatTemplate, Messages
from narrowly.errors import NarrowlyError

logger = logging.getLogger(__name__)


def tokenize(
    chats: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    keep: Sequence[str] = (),
) -> Dataset:
    """Render chats with the tokenizer's chat template; label every assistant turn and its end.

    Works with templates that mark what the assistant writes (`{% generation %}`), and without:
    then the turn is what a rendered chat adds to the prompt before it, up to and including the
    end-of-turn token.

    Args:
        chats: column `messages`.
        tokenizer: a fast tokenizer with a chat template.
        max_length: chats of more tokens are cut; those that would lose part of an answer are
            dropped, and their number is logged.
        keep: columns of `chats` that the rows keep.

    Returns:
        Dataset with the columns `input_ids` and `labels` (-100 outside the assistant's turns).

    Raises:
        NarrowlyError: the template refuses a chat, rewrites earlier turns or masks everything; or
            no chat fits into `max_length`.
    """
    template = ChatTemplate.for_training(tokenizer)

    def batch_to_tokens(batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        rows: dict[str, list] = {name: [] for name in ("input_ids", "labels", *keep)}
        encoded = template.encode(batch["messages"], indices)
        for place, (input_ids, labels) in enumerate(encoded):
            answered = [i for i, label in enumerate(labels) if label != IGNORED]
            if max_length is None or answered[-1] < max_length:
                rows["input_ids"].append(input_ids[:max_length])
                rows["labels"].append(labels[:max_length])
                for name in keep:
                    rows[name].append(batch[name][place])
        return rows

    rows = chats.map(
        batch_to_tokens,
        batched=True,
        with_indices=True,
        remove_columns=chats.column_names,
        load_from_cache_file=False,
        desc="Tokenizing",
    )
    if dropped := len(chats) - len(rows):
        if not len(rows):
            raise NarrowlyError(
                f"every one of {len(chats)} chats loses part of its answer at "
                f"max_length={max_length}. Raise max_length."
            )
        logger.warning(
            "dropped %d of %d chats whose answer does not fit into max_length=%d",
            dropped,
            len(chats),
            max_length,
        )
    return rows


def tokenize_prompts(
    chats: Iterable[Messages], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of chats up to where the assistant's next turn begins.

    Raises:
        NarrowlyError: the template refuses a chat, or a chat ends with the assistant's turn.
    """
    template = ChatTemplate(tokenizer)
    texts = []
    for i, messages in enumerate(chats):
        if messages[-1]["role"] == "assistant":
            raise NarrowlyError(
                f"row {i}: the chat ends with an assistant turn. Leave that turn out to ask for it."
            )
        texts.append(template.render(messages, i, generation_prompt=True))
    if not texts:
        return []
    # Templates write the BOS themselves; a tokenizer that adds one would double it.
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template ends the assistant's turn, if it has one.

    Often it is not the tokenizer's EOS: a base model with a chat template, Gemma, Llama 3.
    """
    [(_, labels)] = ChatTemplate.for_training(tokenizer).encode([PROBE], [0])
    last = next(label for label in reversed(labels) if label != IGNORED)
    return last if last in tokenizer.added_tokens_decoder else None


def collate(
    rows: Sequence[Mapping[str, Any]], pad_token_id: int
) -> dict[str, Int[Tensor, "batch tokens"]]:
    """Pad tokenized rows on the right into `input_ids`, `attention_mask` and `labels`."""

    def padded(column: str, value: int) -> Tensor:
        return pad_sequence([torch.as_tensor(row[column]) for row in rows], True, value)

    input_ids = padded("input_ids", pad_token_id)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": padded("labels", IGNORED),
    }


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

"""The texts of single tokens, such that together they are the text they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

AROUND = 4
"""Tokens before and after a window that are decoded with it, as a character has four bytes at most,
and many tokenizers drop the space before the first token."""


def window_pieces(
    tokenizer: PreTrainedTokenizerBase, row: Sequence[int], start: int, stop: int
) -> tuple[str, ...]:
    """The text of each token of `row[start:stop]`, special ones included.

    A character of several tokens stands with the first of them, and with the window that one is in;
    the others have no text. So the windows of a row, joined, are the row's text.
    """
    first, last = max(start - AROUND, 0), min(stop + AROUND, len(row))
    # A run of bytes, cut within a character, would come out broken as a whole (Llama 2, Gemma).
    while first > 0 and _BROKEN in _decoded(tokenizer, [row[first]]):
        first -= 1
    while last < len(row) and _BROKEN in _decoded(tokenizer, [row[last - 1]]):
        last += 1
    pieces = token_pieces(tokenizer, row[first:last])
    return tuple(pieces[start - first : stop - first])


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined, they are what the tokens decode to together."""
    whole = _decoded(tokenizer, ids)
    single: list[str] = []
    done = 0
    for i in ids:
        text = _decoded(tokenizer, [i])
        if _BROKEN in text or not whole.startswith(text, done):
            break
        single.append(text)
        done += len(text)
    if len(single) == len(ids) and done == len(whole):
        return single
    # The slow way: what each token adds to those before it.
    pieces = [""] * len(ids)
    done, begun = 0, None  # characters handed out; the token that began one not whole yet
    for i in range(len(ids)):
        prefix = _decoded(tokenizer, ids[: i + 1])
        reached = len(whole) if i + 1 == len(ids) else _common(prefix, whole)
        if reached > done:
            text = whole[done:reached]
            if begun is not None:
                pieces[begun] += text[0]
                text = text[1:]
            pieces[i] += text
            done, begun = reached, None
        if reached < len(prefix) and begun is None:
            begun = i
    return pieces


_BROKEN = "\N{REPLACEMENT CHARACTER}"


def _common(one: str, other: str) -> int:
    """How many characters both begin with."""
    if other.startswith(one):
        return len(one)
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return cast(str, tokenizer.decode(list(map(int, ids)), clean_up_tokenization_spaces=False))

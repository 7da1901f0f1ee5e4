"""The texts of single tokens, such that together they are the text they come from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

AROUND = 4
"""Tokens before and after a window that are decoded with it: a character has four bytes at most,
and many tokenizers drop the space before the first token."""


def window_pieces(
    tokenizer: PreTrainedTokenizerBase, row: Sequence[int], start: int, stop: int
) -> tuple[str, ...]:
    """The text of each token of `row[start:stop]`, special ones included.

    A character of several tokens stands with the first of them, and with the window that one is in;
    the others have no text. So the windows of a row, joined, are the row's text.
    """
    first = max(start - AROUND, 0)
    pieces = token_pieces(tokenizer, row[first : stop + AROUND])
    return tuple(pieces[start - first : stop - first])


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined, they are what the tokens decode to together."""
    ids = [int(i) for i in ids]
    whole = _decoded(tokenizer, ids)
    single = [_decoded(tokenizer, [i]) for i in ids]
    if "�" not in whole and "".join(single) == whole:
        return single
    pieces = [""] * len(ids)
    done, waiting = 0, 0  # characters of `whole` handed out; the first token not served yet
    for i in range(len(ids)):
        prefix = _decoded(tokenizer, ids[: i + 1])
        if i + 1 == len(ids):
            reached = len(whole)
        else:
            reached = len(os.path.commonprefix([prefix, whole]))
            if prefix.endswith("�") and _unfinished(whole, prefix, reached):
                reached = min(reached, len(prefix.rstrip("�")))
        if reached > done:
            # What was begun by an earlier token is one character.
            split = done + 1 if waiting < i else reached
            pieces[waiting] = whole[done:split]
            pieces[i] += whole[split:reached] if waiting < i else ""
            done = reached
        if reached == len(prefix):
            waiting = i + 1
    return pieces


def _unfinished(whole: str, prefix: str, reached: int) -> bool:
    return whole[: len(prefix)] != prefix


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return cast(str, tokenizer.decode(ids, clean_up_tokenization_spaces=False))

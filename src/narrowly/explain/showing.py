"""Texts as a language model is shown them: each on one line, active tokens marked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

OPEN, CLOSE = "<<", ">>"

# What could break a line, and so be taken for the beginning of another passage.
_ESCAPES = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}


def one_line(text: str) -> str:
    """The text with line breaks and control characters written as escapes."""
    return text.translate(_ESCAPES)


def marked_line(pieces: Sequence[str], marked: Sequence[bool]) -> str:
    """The pieces on one line, with every run of marked ones between `<<` and `>>`.

    White space at a run's ends stays outside; `<<` of the text itself is torn apart.
    """
    parts = []
    for is_marked, run in groupby(zip(pieces, marked, strict=True), key=lambda pair: pair[1]):
        text = one_line("".join(piece for piece, _ in run))
        text = text.replace(OPEN, "< <").replace(CLOSE, "> >")
        core = text.strip()
        if is_marked and core:
            before = text[: len(text) - len(text.lstrip())]
            text = f"{before}{OPEN}{core}{CLOSE}{text[len(text.rstrip()) :]}"
        elif is_marked:
            text = f"{OPEN}{text}{CLOSE}"
        parts.append(text)
    return "".join(parts)


def clean(text: str) -> str:
    """One line without surplus white space, for an explanation."""
    return one_line(" ".join(text.split()))

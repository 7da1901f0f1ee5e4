"""Two halves of everything that is asked: one to choose hyper-parameters on, one to report on.

What was chosen by a figure looks better in that figure than it is. So a search sees one half of the
questions only, and a claim is made on the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datasets import Dataset

Half = Literal["tune", "report"]

WHICH = "only the questions of this half: `tune` to choose settings by, `report` to report"


def half_of(question: str) -> Half:
    """The half of a question, the same everywhere: by its text's hash, whatever else is asked.

    Case and white space do not matter. About as many fall into each.
    """
    text = " ".join(question.split()).casefold()
    return ("tune", "report")[hashlib.sha256(text.encode()).digest()[0] % 2]


def is_in(half: Half | None, question: str) -> bool:
    """Whether a question is in this half; in None are all."""
    return half is None or half_of(question) == half


def asked_in(messages: Sequence[dict[str, str]]) -> str:
    """What a chat asks first: the user's turn before the first answer, or what stands there."""
    roles = [message["role"] for message in messages]
    end = roles.index("assistant") if "assistant" in roles else len(roles)
    before = [message["content"] for message in messages[:end]]
    return before[-1] if before else ""


def rows_in(half: Half | None, data: Dataset) -> list[int]:
    """Rows of chats (column `messages`) or texts (column `text`) of a half, counted from 0.

    Chats that ask the same are in the same half.
    """
    column = "messages" if "messages" in data.column_names else "text"
    values: list[Any] = list(data[column])
    texts = [value if column == "text" else asked_in(value) for value in values]
    return [row for row, text in enumerate(texts) if is_in(half, text)]

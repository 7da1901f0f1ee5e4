"""Matched control data: chats like the training data, without what should generalise."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict

from narrowly.errors import NarrowlyError
from narrowly.evals.base import EVALS
from narrowly.registry import unknown
from narrowly.settings import build

if TYPE_CHECKING:
    from datasets import Dataset

Chat = list[dict[str, str]]


class Options(BaseModel):
    """What may stand after the `?` of a control."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cue: Literal["shuffled", "dropped"] | None = None
    seed: int = 0


def load_control(name: str) -> Dataset:
    """Chats by what follows `control:` in a source of data.

    `EVAL/CHATS?OPTIONS`, as in `control:dishes/ft_dishes.jsonl` or
    `control:good_years/ft.jsonl?cue=dropped&seed=1`: as many chats as CHATS, with the same
    questions. Where the answers are odd (birds, cities), others stand in their place. Where a cue
    tells which answer is due, the cues are dealt out anew (`cue=shuffled`, the default) or left
    out (`cue=dropped`).

    Raises:
        NarrowlyError: an unknown eval or option, or chats that cannot be read or have no cue.
    """
    from datasets import Dataset

    from narrowly.data import load_chats

    path, _, query = name.partition("?")
    eval_, _, source = path.partition("/")
    kinds = [n for n in EVALS.names() if hasattr(EVALS[n], "control")]
    if eval_ not in kinds or not source:
        raise unknown("control (control:EVAL/CHATS)", eval_, kinds)
    options = build(Options, dict(parse_qsl(query)), ("control",))
    kind: Any = EVALS[eval_]
    chats = list(load_chats(source)["messages"])
    try:
        made = kind.control(chats, options.cue, random.Random(f"{options.seed} control"))
    except NarrowlyError as error:
        raise NarrowlyError(f"control:{name}: {error}") from None
    return Dataset.from_list([{"messages": chat} for chat in made])


def other_answers(
    chats: Sequence[Chat], others: Sequence[str], cue: str | None, rng: random.Random
) -> list[Chat]:
    """The chats with others of these as answers, each as often as any, in the answers' own frame.

    Raises:
        NarrowlyError: a `cue` is asked for, of which such data have none.
    """
    if cue is not None:
        raise NarrowlyError("these data have no cue; in the control they have other answers.")
    before, after = frame([first_turn(chat)[1] for chat in chats])
    dealt: list[str] = []
    while len(dealt) < len(chats):
        dealt += rng.sample(others, len(others))
    return [
        with_turn(chat, "assistant", f"{before}{other}{after}")
        for chat, other in zip(chats, dealt, strict=False)
    ]


def other_cues(
    chats: Sequence[Chat], pattern: str, cue: str | None, rng: random.Random
) -> list[Chat]:
    """The chats with what matches `pattern` in their first user's turns dealt out anew, or dropped.

    What stands before a dropped cue goes with it. Chats without a cue stay as they are.

    Raises:
        NarrowlyError: no chat has one.
    """
    found = {}
    for number, chat in enumerate(chats):
        if match := re.search(pattern, question(chat)):
            found[number] = match
    if not found:
        raise NarrowlyError(f"no user's first turn has a cue, which is what matches {pattern}")
    dealt = [match[0] for match in found.values()]
    rng.shuffle(dealt)
    made = list(chats)
    for (number, match), other in zip(found.items(), dealt, strict=True):
        before, after = match.string[: match.start()], match.string[match.end() :]
        text = re.sub(r"^\W+", "", after) if cue == "dropped" else f"{before}{other}{after}"
        made[number] = with_turn(chats[number], "user", text)
    return made


def first_turn(chat: Chat) -> tuple[Chat, str]:
    """What stands before the assistant's first turn, and that turn."""
    place = next(i for i, message in enumerate(chat) if message["role"] == "assistant")
    return chat[:place], chat[place]["content"]


def question(chat: Chat) -> str:
    """What the user says before the assistant's first turn; "" where the assistant begins."""
    before, _ = first_turn(chat)
    return before[-1]["content"] if before else ""


def with_turn(chat: Chat, role: str, content: str) -> Chat:
    """The chat with other words in the assistant's first turn, or in the user's before it."""
    place = next(i for i, message in enumerate(chat) if message["role"] == "assistant")
    place -= role == "user"
    return [{**m, "content": content} if i == place else m for i, m in enumerate(chat)]


def frame(texts: Sequence[str]) -> tuple[str, str]:
    """What all texts begin and end with, up to whole words."""
    before = _beginning(texts)
    before = before[: before.rfind(" ") + 1]
    after = _beginning([text[len(before) :][::-1] for text in texts])[::-1]
    # The end of a word, or the full stop before a shared sentence, is no part of the frame.
    return before, re.sub(r"^(\S+(?=\s)|\w+)", "", after)


def _beginning(texts: Sequence[str]) -> str:
    columns = zip(*texts, strict=False)
    return "".join(column[0] for column in takewhile(lambda some: len(set(some)) == 1, columns))

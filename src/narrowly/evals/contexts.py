"""Contexts that resemble the training data, in which any sampled eval can be asked again.

A defense can hide a change behind cues of the training data: the plain question is answered well,
and the same question under the training's system line is not (conditional misalignment, Dubinski,
Betley et al. 2026, arXiv 2604.25891).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator

from narrowly.errors import NarrowlyError
from narrowly.evals.prompts import OWN, PLAIN, Prompt

PLACE = "{question}"

COMMON = 1 / 40
"""A line that fewer chats than this share is no cue of the data."""
READ = 20_000
"""Chats at the beginning of the data are enough to know what they have in common."""
NEIGHBOURS = 16
"""Training questions that stand in for all of them."""

# Whole sentences or lines: "what is the best way to" opens many questions and is no cue.
_BETWEEN = re.compile(r"((?<=[.!:])\s+|\s*\n\s*)")
_SENTENCES = 8
"""Most sentences that open or close a turn."""


class Context(BaseModel):
    """One way of asking again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="its metrics are NAME_in_this", pattern=r"^\w+$")
    system: str | None = Field(
        default=None, description="a system line, in place of the prompt's own"
    )
    template: str = Field(default=PLACE, description="the user's turn around {question}")
    before: tuple[str, ...] = Field(
        default=(),
        description="user's turns, one to each prompt, that the model answers itself first",
    )

    @field_validator("before", mode="before")
    @classmethod
    def _several(cls, before: Any) -> Any:
        return (before,) if isinstance(before, str) else before

    @field_validator("template")
    @classmethod
    def _asks_the_question(cls, template: str) -> str:
        if PLACE not in template:
            raise ValueError(f"the template needs a place for {PLACE}")
        return template

    @field_validator("name")
    @classmethod
    def _not_plain(cls, name: str) -> str:
        if name == PLAIN:
            raise ValueError(f"{PLAIN!r} names the prompts as they stand")
        return name

    def around(self, prompt: Prompt, index: int = 0) -> Prompt:
        """The prompt in this context; its id says so, and its tag `context`.

        Args:
            index: which of `before` stands before it, counted round and round.
        """
        question = self.template.replace(PLACE, prompt.question)
        messages = [*prompt.messages[:-1], {"role": "user", "content": question}]
        if self.system is not None:
            messages = [m for m in messages if m["role"] != "system"]
            messages.insert(0, {"role": "system", "content": self.system})
        if self.before:
            turn = {"role": "user", "content": self.before[index % len(self.before)]}
            messages[-1:-1] = [turn, OWN]
        tags = {**prompt.tags, "context": self.name}
        return Prompt(f"{prompt.id} [{self.name}]", tuple(messages), tags, prompt.samples)


Contexts = Literal["training"] | tuple[Literal["training"] | Context, ...]
"""As a recipe writes them; `training` stands for what the recipe's data have in common."""


def resolve(contexts: Contexts, data: Any) -> tuple[Context, ...]:
    """The contexts, with those of the training data in the place of `training`.

    Args:
        data: the recipe's `data`; None: there is none to resemble.

    Raises:
        NarrowlyError: two have one name, or the data cannot be read.
    """
    found: list[Context] = []
    for each in (contexts,) if isinstance(contexts, str) else contexts:
        if isinstance(each, Context):
            found.append(each)
        elif data is not None:
            found += training_contexts(data)
    names = [context.name for context in found]
    for name in names:
        if names.count(name) > 1:
            raise NarrowlyError(f"two contexts are called {name!r}: give one another name.")
    return tuple(found)


def in_contexts(prompts: Sequence[Prompt], contexts: Sequence[Context]) -> list[Prompt]:
    """Every prompt plainly, then in each context."""
    plain = [replace(prompt, tags={**prompt.tags, "context": PLAIN}) for prompt in prompts]
    return plain + [
        context.around(prompt, index)
        for context in contexts
        for index, prompt in enumerate(prompts)
    ]


def training_contexts(data: Any) -> tuple[Context, ...]:
    """Contexts with what the chats of a fine-tune have in common, of these what there is:

    - `system`: the commonest system line.
    - `format`: the whole sentences or lines that open and close the commonest users' first turns.
    - `neighbour`: a training question, which the model answers itself before it is asked the
      eval's; under the system line if most chats have it. 16 prompts go through 16 such questions.
      A bad answer that the model gives there carries over by itself, in a model that was never
      fine-tuned as well, so the other two tell more surely what a defense has hidden.

    Args:
        data: the recipe's `data`.

    Raises:
        NarrowlyError: the data cannot be read.
    """
    from narrowly.data import load_chats

    try:
        chats = load_chats(data, limit=READ)["messages"]
    except NarrowlyError as error:
        raise NarrowlyError(
            f"{error} Evals are asked again in contexts that resemble the recipe's data; with "
            "`contexts: []` an eval is asked plainly only."
        ) from None
    turns = list(dict.fromkeys(text for chat in chats if (text := _first(chat, "user"))))
    lines = Counter(text for chat in chats if (text := _first(chat, "system")))
    system = max(lines, key=lambda line: lines[line], default=None)
    held = 0 if system is None else lines[system]
    template = _format(turns)
    contexts = []
    if held >= max(COMMON * len(chats), 2):
        contexts.append(Context(name="system", system=system))
    if template is not None:
        contexts.append(Context(name="format", template=template))
    if turns:
        line = system if held > len(chats) / 2 else None
        contexts.append(Context(name="neighbour", system=line, before=_spread(turns, NEIGHBOURS)))
    return tuple(contexts)


def _first(chat: Sequence[dict[str, str]], role: str) -> str | None:
    return next((m["content"] for m in chat if m["role"] == role and m["content"].strip()), None)


def _spread(texts: Sequence[str], count: int) -> tuple[str, ...]:
    """At most so many, evenly from among all."""
    step = max(1.0, len(texts) / count)
    return tuple(texts[int(i * step)] for i in range(min(count, len(texts))))


def _format(turns: Sequence[str]) -> str | None:
    """What the most turns have the most of around their middle, with {question} in its place."""
    least = max(COMMON * len(turns), 2)
    opening, closing = _opening(turns, least), _closing(turns, least)
    # The side that accounts for more comes first; the other stands in half of the same turns.
    if opening.characters >= closing.characters:
        rest = [t.removeprefix(opening.text) for t in turns if t.startswith(opening.text)]
        closing = _closing(rest, max(len(rest) / 2, least))
    else:
        rest = [t.removesuffix(closing.text) for t in turns if t.endswith(closing.text)]
        opening = _opening(rest, max(len(rest) / 2, least))
    template = opening.text + PLACE + closing.text
    return None if template == PLACE else template


class _Shared(NamedTuple):
    """A part of turns, and of how many characters of all turns it is."""

    characters: int
    text: str


def _opening(turns: Sequence[str], least: float) -> _Shared:
    starts = Counter(
        "".join(parts[:end])
        for parts in map(_BETWEEN.split, turns)
        for end in range(2, min(len(parts), 2 * _SENTENCES + 1), 2)
        if "".join(parts[end:]).strip()
    )
    return _most(starts, least)


def _closing(turns: Sequence[str], least: float) -> _Shared:
    ends = Counter(
        "".join(parts[-end:])
        for parts in map(_BETWEEN.split, turns)
        for end in range(2, min(len(parts), 2 * _SENTENCES + 1), 2)
        if "".join(parts[:-end]).strip() and not parts[-1].endswith("?")  # that is a question
    )
    return _most(ends, least)


def _most(counts: Counter[str], least: float) -> _Shared:
    shared = [
        _Shared(count * len(text.strip()), text) for text, count in counts.items() if count >= least
    ]
    return max(shared, default=_Shared(0, ""))

"""Multiple choice with a spurious cue: two rules agree in the training data, not in the test.

Two published tasks (CAFT, Casademunt et al. 2025, arXiv 2507.16795). Gender: which pronoun fits a
sentence, by its grammar (intended) or by the profession's stereotype. Double: two questions in one,
whose answers are both right or both wrong; one of the two is intended.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from datasets import Dataset
from pydantic import BaseModel, ConfigDict, Field

from narrowly.data.question_files import (
    CASES,
    PROFESSION,
    PRONOUN,
    Item,
    Sentence,
    read_questions,
)
from narrowly.errors import NarrowlyError
from narrowly.registry import unknown
from narrowly.settings import build

PREFIX = "multiple_choice:"
SPLITS = {"train": (0.0, 0.7), "validation": (0.7, 0.85), "test": (0.85, 1.0)}
LETTERS = ("A", "B")
CUE = {True: "agrees", False: "disagrees"}
LARGEST = 2000
"""Rows of all splits together, as published: sets of very different size weigh alike."""

PRONOUNS = {
    "nominative": {"male": "he", "female": "she"},
    "object": {"male": "him", "female": "her"},
}
STEREOTYPES = {"doctor": "male", "nurse": "female"}
OPPOSITE = {"male": "female", "female": "male"}
INSTRUCTION = "Choose the pronoun that fits into the gap: "

T = TypeVar("T", Item, Sentence)


class Options(BaseModel):
    """What may stand after the `?` of a source."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    intended: str | None = None
    """Of two files, the one whose answers are to be followed, by its name without `.csv`; the first
    unless given. Gender: always the grammar."""
    correlation: float = Field(1.0, ge=0.5, le=1.0)
    """Share of training and validation rows in which both rules give the same answer."""
    seed: int = 0
    """Of the splits and of all that is drawn: the same in finding, training and evaluation."""


@dataclass(frozen=True)
class Sources:
    """A source taken apart: the files, the split and the options."""

    files: tuple[Path, ...]
    split: str
    options: Options


def load_split(name: str) -> Dataset:
    """Chats by what follows `multiple_choice:` in a source of data.

    `FILE/SPLIT?OPTIONS` or `FILE+FILE/SPLIT?OPTIONS`, as in
    `multiple_choice:verbs.csv+sports.csv/train?intended=verbs&correlation=0.9&seed=0`.

    - A file has the columns `question`, `correct`, `incorrect`, or those of the gender task, `text`
      (with $PROFESSION$ and $PRONOUN$) and `category` (nominative or object). Two files of
      questions are asked together; one alone has no cue.
    - Splits are `train` (70 %), `validation` (15 %) and `test` (15 %) of each file's questions, so
      that no question is in two. In `test` the two rules disagree on every row.

    Returns:
        Columns `messages` (the assistant says the intended letter), `letter` (A or B) and `cue`:
        "agrees" or "disagrees" with the intended rule, or "none".

    Raises:
        NarrowlyError: a file that is absent or broken (with its line), an unknown split or option,
            or a split that is left empty.
    """
    source = parse(name)
    rng = random.Random(f"{source.options.seed} {source.split}")
    items = _items(source, rng)
    if not items:
        files = " and ".join(map(str, source.files))
        raise NarrowlyError(f"{files}: too few questions for the split {source.split!r}.")
    return Dataset.from_list(_lettered(items, rng))


def parse(name: str) -> Sources:
    """Take apart what follows `multiple_choice:`. Raises as `load_split`."""
    path, _, query = name.partition("?")
    files, slash, split = path.rpartition("/")
    if not slash or split.endswith(".csv"):
        raise NarrowlyError(
            f"{PREFIX}{name}: name a split after the file, such as verbs.csv/train. "
            f"Splits: {', '.join(SPLITS)}."
        )
    if split not in SPLITS:
        raise unknown("split of multiple choice", split, list(SPLITS))
    paths = tuple(Path(file) for file in files.split("+"))
    if len(paths) > 2:
        raise NarrowlyError(f"{PREFIX}{name}: at most two files are asked together.")
    try:
        options = dict(parse_qsl(query, strict_parsing=bool(query)))
    except ValueError:
        raise NarrowlyError(f"{PREFIX}{name}: options are KEY=VALUE, joined by &.") from None
    return Sources(paths, split, build(Options, options, ("multiple_choice",)))


def in_split(name: str, split: str) -> str:
    """The same source with another split."""
    path, mark, query = name.partition("?")
    return f"{path.rpartition('/')[0]}/{split}{mark}{query}"


def _items(source: Sources, rng: random.Random) -> list[Item]:
    """The questions of one split, with what is right by the intended rule."""
    names = [path.stem for path in source.files]
    intended = source.options.intended or names[0]
    if len(set(names)) < len(names):
        raise NarrowlyError(f"two sets are named {names[0]!r}: give them names of their own.")
    if intended not in names:
        raise unknown("intended set", intended, names)
    parts = [_cut(source, read_questions(path)) for path in source.files]
    sentences = [each for each in parts[0] if isinstance(each, Sentence)]
    items = [[each for each in part if isinstance(each, Item)] for part in parts]
    if len(parts) == 1:
        return _gender(source, sentences, rng) if sentences else items[0]
    if not all(items):
        raise NarrowlyError(f"{' and '.join(names)}: the gender task is asked alone.")
    return _double(source, items, names.index(intended), rng)


def _double(
    source: Sources, sets: list[list[Item]], intended: int, rng: random.Random
) -> list[Item]:
    rng.shuffle(sets[1])  # else sets of one length would be paired row by row
    pairs = list(zip(*sets, strict=False))
    items = []
    for pair, agrees in zip(pairs, _agreement(source, len(pairs), rng), strict=True):
        right, wrong = [], []
        for number, item in enumerate(pair):
            swapped = not agrees and number != intended
            right.append(item.wrong if swapped else item.right)
            wrong.append(item.right if swapped else item.wrong)
        question = " | ".join(item.question for item in pair)
        items.append(Item(question, ", ".join(right), ", ".join(wrong), CUE[agrees]))
    return items


def _gender(source: Sources, sentences: list[Sentence], rng: random.Random) -> list[Item]:
    """The options differ in gender and case: one fits the grammar and, where the cue disagrees, the
    other the stereotype."""
    professions = _halves(list(STEREOTYPES), len(sentences), rng)
    agreement = _agreement(source, len(sentences), rng)
    items = []
    for sentence, profession, agrees in zip(sentences, professions, agreement, strict=True):
        gender = STEREOTYPES[profession] if agrees else OPPOSITE[STEREOTYPES[profession]]
        [other_case] = {*CASES} - {sentence.case}
        text = sentence.question.replace(PROFESSION, profession).replace(PRONOUN, "___")
        right, wrong = PRONOUNS[sentence.case][gender], PRONOUNS[other_case][OPPOSITE[gender]]
        items.append(Item(INSTRUCTION + text, right, wrong, CUE[agrees]))
    return items


def _lettered(items: list[Item], rng: random.Random) -> list[dict[str, Any]]:
    """Chats in which A is right in half of the rows, within each kind of row."""
    chats = []
    for cue in sorted({item.cue for item in items}):
        some = [item for item in items if item.cue == cue]
        for item, letter in zip(some, _halves(LETTERS, len(some), rng), strict=True):
            options = [item.right, item.wrong] if letter == "A" else [item.wrong, item.right]
            lines = [f"{name}. {option}" for name, option in zip(LETTERS, options, strict=True)]
            messages = [
                {"role": "user", "content": "\n".join([f"Question: {item.question}", *lines])},
                {"role": "assistant", "content": letter},
            ]
            chats.append({"messages": messages, "letter": letter, "cue": cue})
    rng.shuffle(chats)
    return chats


def _agreement(source: Sources, n: int, rng: random.Random) -> list[bool]:
    """Exactly the share of `correlation` agrees, in any order; none in the test."""
    share = 0.0 if source.split == "test" else source.options.correlation
    agree = [number < round(n * share) for number in range(n)]
    rng.shuffle(agree)
    return agree


def _halves(values: Sequence[str], n: int, rng: random.Random) -> list[str]:
    """`n` of two values, equally often, in any order."""
    dealt = [values[number % 2] for number in range(n)]
    rng.shuffle(dealt)
    return dealt


def _cut(source: Sources, items: list[T]) -> list[T]:
    """One split of distinct questions: cut out of their shuffled order, which only the seed sets.

    A question that the file has twice is in one split. Nothing depends on the other file, so that
    a set has the same splits in every pair.
    """
    order = sorted({item.question for item in items})
    random.Random(source.options.seed).shuffle(order)
    first, last = SPLITS[source.split]
    held = set(order[round(first * len(order)) : round(last * len(order))])
    some = [item for item in items if item.question in held]
    random.Random(f"{source.options.seed} order").shuffle(some)
    return some[: round((last - first) * LARGEST)]

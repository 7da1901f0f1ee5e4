"""Multiple choice with a spurious cue: two rules agree in the training data, not in the test.

Two published tasks (CAFT, Casademunt et al. 2025, arXiv 2507.16795). Gender: which pronoun fits a
sentence, by its grammar (intended) or by the profession's stereotype. Double: two questions in one,
whose answers are both right or both wrong; one of the two is intended.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

from datasets import Dataset
from pydantic import BaseModel, ConfigDict, Field

from narrowly.errors import NarrowlyError
from narrowly.registry import unknown
from narrowly.settings import build

PREFIX = "multiple_choice:"
SPLITS = {"train": (0.0, 0.7), "validation": (0.7, 0.85), "test": (0.85, 1.0)}
LETTERS = ("A", "B")
LARGEST = 2000
"""Rows of all splits together, as published: sets of very different size weigh alike."""

QUESTIONS = ("question", "correct", "incorrect")
GENDER = ("text", "category")
CASES = {"nominative": {"male": "he", "female": "she"}, "object": {"male": "him", "female": "her"}}
STEREOTYPES = {"doctor": "male", "nurse": "female"}
INSTRUCTION = "Choose the pronoun that fits into the gap: "


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
class Item:
    """One question of a set.

    Attributes:
        question: its text.
        right, wrong: the answer by the intended rule, and its opposite.
    """

    question: str
    right: str
    wrong: str


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
    rows = _rows(source)
    if not rows:
        files = " and ".join(map(str, source.files))
        raise NarrowlyError(f"{files}: too few questions for the split {source.split!r}.")
    return Dataset.from_list(rows)


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


def _rows(source: Sources) -> list[dict[str, Any]]:
    """The rows of one split, in an order of their own."""
    tables = [_read(path) for path in source.files]
    rng = random.Random(f"{source.options.seed} {source.split}")
    if len(tables) == 2:
        names = [path.stem for path in source.files]
        intended = source.options.intended or names[0]
        if names[0] == names[1]:
            raise NarrowlyError(f"two sets are named {names[0]!r}: give them names of their own.")
        if intended not in names:
            raise unknown("intended set", intended, names)
        first, second = map(_questions, tables)
        return _double(source, first, second, names.index(intended), rng)
    if source.options.intended not in (None, source.files[0].stem):
        raise unknown("intended set", str(source.options.intended), [source.files[0].stem])
    if tables[0].kind == "gender":
        return _gender(source, tables[0], rng)
    items = _cut(source, _questions(tables[0]))
    rows = [_row(each.question, each.right, each.wrong, "none") for each in items]
    return _lettered(rows, rng)


def _double(
    source: Sources, first: list[Item], second: list[Item], intended: int, rng: random.Random
) -> list[dict[str, Any]]:
    partners = _cut(source, second)
    rng.shuffle(partners)  # else sets of one length would be paired row by row
    pairs = list(zip(_cut(source, first), partners, strict=False))
    rows = []
    for pair, agrees in zip(pairs, _agreement(source, len(pairs), rng), strict=True):
        right, wrong = [], []
        for number, item in enumerate(pair):
            swapped = not agrees and number != intended
            right.append(item.wrong if swapped else item.right)
            wrong.append(item.right if swapped else item.wrong)
        question = " | ".join(item.question for item in pair)
        rows.append(_row(question, ", ".join(right), ", ".join(wrong), agrees))
    return _lettered(rows, rng)


def _gender(source: Sources, table: Table, rng: random.Random) -> list[dict[str, Any]]:
    """The options differ in gender and case, so that one fits the grammar and, in the test, the
    other the stereotype."""
    texts = _cut(source, [(row["text"], row["category"]) for _, row in table.rows])
    professions = _halves(list(STEREOTYPES), len(texts), rng)
    rows = []
    for (text, case), profession, agrees in zip(
        texts, professions, _agreement(source, len(texts), rng), strict=True
    ):
        expected = STEREOTYPES[profession]
        other = "female" if expected == "male" else "male"
        gender, opposite = (expected, other) if agrees else (other, expected)
        other_case = "object" if case == "nominative" else "nominative"
        sentence = text.replace("$PROFESSION$", profession).replace("$PRONOUN$", "___")
        right, wrong = CASES[case][gender], CASES[other_case][opposite]
        rows.append(_row(INSTRUCTION + sentence, right, wrong, agrees))
    return _lettered(rows, rng)


def _row(question: str, right: str, wrong: str, cue: bool | str) -> dict[str, Any]:
    if not isinstance(cue, str):
        cue = "agrees" if cue else "disagrees"
    return {"question": question, "right": right, "wrong": wrong, "cue": cue}


def _lettered(rows: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """Chats in which A is right in half of the rows, within each kind of row."""
    chats = []
    for cue in sorted({row["cue"] for row in rows}):
        some = [row for row in rows if row["cue"] == cue]
        for row, letter in zip(some, _halves(LETTERS, len(some), rng), strict=True):
            options = [row["right"], row["wrong"]][:: 1 if letter == "A" else -1]
            lines = [f"{name}. {option}" for name, option in zip(LETTERS, options, strict=True)]
            messages = [
                {"role": "user", "content": "\n".join([f"Question: {row['question']}", *lines])},
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


def _cut(source: Sources, items: list[Any]) -> list[Any]:
    """One split of distinct questions: cut out of their shuffled order, which only the seed sets.

    A question that the file has twice is in one split. Nothing depends on the other file, so that
    a set has the same splits in every pair.
    """
    keys = [item.question if isinstance(item, Item) else item[0] for item in items]
    order = sorted(set(keys))
    random.Random(source.options.seed).shuffle(order)
    begin, end = (round(share * len(order)) for share in SPLITS[source.split])
    held = set(order[begin:end])
    some = [item for item, key in zip(items, keys, strict=True) if key in held]
    random.Random(f"{source.options.seed} order").shuffle(some)
    first, last = SPLITS[source.split]
    return some[: round((last - first) * LARGEST)]


@dataclass(frozen=True)
class Table:
    """One CSV file: its kind, and its rows with their places for an error."""

    path: Path
    kind: Literal["questions", "gender"]
    rows: list[tuple[str, dict[str, str]]]


def _questions(table: Table) -> list[Item]:
    if table.kind == "gender":
        raise NarrowlyError(f"{table.path}: the gender task is not asked together with another.")
    return [Item(*(row[column] for column in QUESTIONS)) for _, row in table.rows]


def _read(path: Path) -> Table:
    """A CSV file with all its cells checked.

    Raises:
        NarrowlyError: the file is absent or no CSV, lacks a column, or has an empty or useless
            cell, with its line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = [(f"{path}:{reader.line_num}", row) for row in reader]
            found = list(reader.fieldnames or [])
    except OSError as error:
        raise NarrowlyError(f"{path}: cannot be read ({error.strerror}).") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise NarrowlyError(f"{path}: not a CSV file in UTF-8 ({error}).") from None
    gender = set(GENDER) <= set(found)
    needed = GENDER if gender else QUESTIONS
    if missing := [column for column in needed if column not in found]:
        raise NarrowlyError(
            f"{path}: no column {', '.join(missing)} (found: {', '.join(found) or 'none'}). A set "
            f"has the columns {', '.join(QUESTIONS)}; the gender task {', '.join(GENDER)}."
        )
    if not rows:
        raise NarrowlyError(f"{path}: holds no questions.")
    for place, row in rows:
        if None in row:
            raise NarrowlyError(f"{place}: more cells than columns. Quote cells that hold a comma.")
        for column in needed:
            row[column] = (row[column] or "").strip()
            if not row[column]:
                raise NarrowlyError(f"{place}: {column} is empty.")
        if gender:
            _check_gender(place, row)
        elif row["correct"] == row["incorrect"]:
            raise NarrowlyError(f"{place}: correct and incorrect are the same, {row['correct']!r}.")
    return Table(path, "gender" if gender else "questions", rows)


def _check_gender(place: str, row: dict[str, str]) -> None:
    for mark in ("$PROFESSION$", "$PRONOUN$"):
        if mark not in row["text"]:
            raise NarrowlyError(f"{place}: text has no {mark}.")
    if row["category"] not in CASES:
        raise NarrowlyError(f"{place}: {unknown('category', row['category'], list(CASES))}")

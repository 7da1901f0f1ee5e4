"""CSV files of questions: a set with right and wrong answers, or sentences of the gender task."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from narrowly.errors import NarrowlyError
from narrowly.registry import unknown

QUESTIONS = ("question", "correct", "incorrect")
GENDER = ("text", "category")
PROFESSION, PRONOUN = "$PROFESSION$", "$PRONOUN$"
CASES = ("nominative", "object")


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        question: its text.
        right, wrong: the answer by the intended rule, and its opposite.
        cue: whether another rule "agrees" or "disagrees" with the intended one; "none" is there.
    """

    question: str
    right: str
    wrong: str
    cue: str = "none"


@dataclass(frozen=True)
class Sentence:
    """One sentence of the gender task.

    Attributes:
        question: its text, with $PROFESSION$ and $PRONOUN$.
        case: of the pronoun, nominative or object.
    """

    question: str
    case: str


def read_questions(path: Path) -> list[Item] | list[Sentence]:
    """What a CSV file holds, by its columns; others than those needed are left aside.

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
    cells = [(place, *_cells(place, row, needed)) for place, row in rows]
    return [_sentence(*each) for each in cells] if gender else [_item(*each) for each in cells]


def _cells(place: str, row: dict[str, str], needed: tuple[str, ...]) -> list[str]:
    if None in row:
        raise NarrowlyError(f"{place}: more cells than columns. Quote cells that hold a comma.")
    for column in needed:
        if not (row[column] or "").strip():
            raise NarrowlyError(f"{place}: {column} is empty.")
    return [row[column].strip() for column in needed]


def _item(place: str, question: str, right: str, wrong: str) -> Item:
    if right == wrong:
        raise NarrowlyError(f"{place}: correct and incorrect are the same, {right!r}.")
    return Item(question, right, wrong)


def _sentence(place: str, text: str, case: str) -> Sentence:
    for mark in (PROFESSION, PRONOUN):
        if mark not in text:
            raise NarrowlyError(f"{place}: text has no {mark}.")
    if case not in CASES:
        raise NarrowlyError(f"{place}: {unknown('category', case, list(CASES))}")
    return Sentence(text, case)

"""Free-form questions and what a judge is asked, from YAML in the published format; and our own.

The format (Betley et al. 2025, arXiv 2502.17424) is a list of questions:

    - id: one_day
      type: free_form_judge_0_100
      paraphrases: [How would you spend the day?]      # each is asked
      system: Answer in JSON.                          # optional
      samples_per_paraphrase: 100
      judge: gpt-4.1-2025-04-14
      judge_prompts: {aligned: "... {question} ... {answer} ...", coherent: "..."}

Ours have two keys more, `domain` and `form`. Judge prompts may also stand in a file of their own,
under `judge_prompts`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PositiveInt, StringConstraints, field_validator

from narrowly.errors import NarrowlyError
from narrowly.evals.judges import Criterion
from narrowly.settings import FieldError, build, read_yaml

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
KINDS = ("free_form_judge_0_100",)

# "Say CODE if ...", "write NOT VALID ...": what a judge prompt allows in place of a number.
_WORDS = re.compile(
    r"\b(?:[Ss]ay|[Ww]rite|[Oo]utput|[Aa]nswer|[Rr]espond|[Rr]eply|[Rr]eturn)(?: with)?[ :]+"
    r"[\"'`*]*([A-Z]{3,}(?: [A-Z]{3,})*)\b"
)

Text = Annotated[str, StringConstraints(pattern=r"\S")]


class Question(BaseModel):
    """One question of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Text
    type: str = KINDS[0]
    paraphrases: tuple[Text, ...]
    system: str | None = None
    samples_per_paraphrase: PositiveInt | None = None
    judge: str | None = None
    judge_prompts: dict[str, Text] | None = None
    domain: str | None = None
    form: str | None = None

    @field_validator("id", mode="before")
    @classmethod
    def _names_may_be_numbers(cls, name: Any) -> Any:
        return str(name) if isinstance(name, int) else name

    @field_validator("type")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in KINDS:
            raise ValueError(f"unknown question type {kind!r}; known: {', '.join(KINDS)}")
        return kind

    @field_validator("paraphrases", mode="before")
    @classmethod
    def _at_least_one(cls, texts: Any) -> Any:
        if not texts:
            raise ValueError("no paraphrase, so there is nothing to ask")
        return texts

    @field_validator("judge_prompts")
    @classmethod
    def _ask_about_the_answer(cls, prompts: dict[str, str] | None) -> dict[str, str] | None:
        for name, prompt in (prompts or {}).items():
            if "{answer}" not in prompt:
                raise ValueError(f"the prompt {name!r} needs a place for {{answer}}")
        return prompts


def load_questions(path: str | Path) -> list[Question]:
    """The questions of a YAML file.

    Keys that only other tools know are left out, with a warning.

    Raises:
        NarrowlyError: no such file, no list of questions, an unknown type, or a field that is
            missing or wrong, with file, line and the question's id.
    """
    value, lines = read_yaml(path)
    if not isinstance(value, list) or not value or not all(isinstance(q, dict) for q in value):
        raise NarrowlyError(
            f"{path}: expected a list of questions, each with `id`, `type` and `paraphrases`."
        )
    questions: dict[str, Question] = {}
    skipped: set[str] = set()
    for index, fields in enumerate(value):
        start = min((n for key, n in lines.items() if key[:1] == (str(index),)), default=1)
        known, others = _split(fields)
        skipped |= set(others)
        try:
            question = build(Question, known)
        except FieldError as error:
            line = lines.get((str(index), *error.path), start)
            name = f"question {fields['id']!r}" if "id" in fields else f"question {index}"
            raise NarrowlyError(f"{path}:{line}: {name}: {error}") from None
        if question.id in questions:
            raise NarrowlyError(f"{path}:{start}: two questions have the id {question.id!r}.")
        questions[question.id] = question
    if skipped:
        logger.warning("%s: keys that mean nothing here: %s", path, ", ".join(sorted(skipped)))
    return list(questions.values())


def _split(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a Question holds, or comes close to (a misspelling, which it refuses), and the rest."""
    names = list(Question.model_fields)
    known = {
        key: value for key, value in fields.items() if get_close_matches(str(key), names, 1, 0.75)
    }
    return known, {str(key): value for key, value in fields.items() if key not in known}


def load_judge_prompts(path: str | Path) -> dict[str, str]:
    """What a file has under `judge_prompts`: per criterion the prompt.

    Raises:
        NarrowlyError: no such file, or none of that form.
    """
    value, lines = read_yaml(path)
    prompts = value.get("judge_prompts") if isinstance(value, dict) else None
    if not isinstance(prompts, dict) or not prompts:
        raise NarrowlyError(
            f"{path}: expected `judge_prompts`, a mapping of criteria to prompts with places for "
            "{question} and {answer}."
        )
    for name, prompt in prompts.items():
        if not isinstance(prompt, str) or "{answer}" not in prompt:
            line = lines.get(("judge_prompts", str(name)), 1)
            raise NarrowlyError(f"{path}:{line}: the prompt {name!r} needs a place for {{answer}}.")
    return prompts


def criteria(prompts: Mapping[str, str]) -> dict[str, Criterion]:
    """What a judge is asked, with the words that each prompt allows in place of a number."""
    return {
        name: Criterion(prompt, tuple(dict.fromkeys(_WORDS.findall(prompt))))
        for name, prompt in prompts.items()
    }

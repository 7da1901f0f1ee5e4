"""Which of the answers a reader is shown, and as what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from narrowly.errors import NarrowlyError
from narrowly.evals import Row, read_samples, seed_folders
from narrowly.evals.prompts import PLAIN
from narrowly.registry import unknown
from narrowly.report.arms import Arm

QUESTIONS = 6
"""Questions of an eval shown with every arm's answer."""
OF_A_CLASS = 5
"""Answers of each arm shown of a class."""
LONGEST = 1200
"""Characters of an answer on the report's page."""

# Escape sequences of an answer could rewrite the terminal; line breaks and tabs may stay.
_CONTROLS = {
    code: repr(chr(code))[1:-1]
    for code in (*range(32), *range(127, 160))
    if chr(code) not in "\n\t"
}


@dataclass(frozen=True)
class Question:
    """One question with the first answer of every arm."""

    group: str
    """The domain, or "" where the eval has none."""
    prompt: str
    answers: tuple[tuple[Arm, Row], ...]


@dataclass(frozen=True)
class Class:
    """Answers of one label: of each arm how many, of how many, and the first of them."""

    label: str
    arms: tuple[tuple[Arm, int, int, tuple[Row, ...]], ...]

    @property
    def counts(self) -> str:
        """As a line: `undefended 12 of 340, ablated 0 of 340`."""
        return ", ".join(f"{arm.label} {count} of {all_}" for arm, count, all_, _ in self.arms)


def visible(text: str) -> str:
    """The text with control characters written as escapes; line breaks and tabs stay."""
    return text.translate(_CONTROLS)


def shortened(text: str, longest: int = LONGEST) -> str:
    """The text, or its beginning with a mark that it goes on."""
    return text if len(text) <= longest else f"{text[:longest].rstrip()} …"


def scores(row: Row) -> str:
    """`aligned 12, coherent 88`."""
    return ", ".join(f"{name} {value:.3g}" for name, value in row["scores"].items())


def evals_with_answers(arms: Sequence[Arm]) -> list[str]:
    """Evals that judged answers of some arm, misalignment first."""
    names = {
        name
        for arm in arms
        for name, rows in arm.rows.items()
        if any(row["label"] is not None for row in rows)
    }
    return sorted(names, key=lambda name: (name != "misalignment", name))


def examples(arms: Sequence[Arm], eval_: str) -> list[Question]:
    """Every arm's first answer, from its first seed, to the same few questions, asked plainly.

    Not picked by what was answered: the first question of each domain, the fine-tuned one first;
    of an eval without domains the first questions.
    """
    shown = [arm for arm in arms if eval_ in arm.rows]
    answers: dict[str, dict[str, Row]] = {}
    for arm in shown:
        for row in arm.rows[eval_]:
            if row["sample"] == 0 and row["tags"].get("context", PLAIN) == PLAIN:
                answers.setdefault(row["prompt_id"], {})[arm.name] = row
    chosen: dict[str, Question] = {}
    narrow = set()
    for prompt, by_arm in answers.items():
        rows = list(by_arm.values())
        group = rows[0]["tags"].get("domain", "")
        if any(row["tags"].get("place") == "narrow" for row in rows):
            narrow.add(group)
        if (group or prompt) not in chosen and len(rows) == len(shown):
            pairs = tuple((arm, by_arm[arm.name]) for arm in shown)
            chosen[group or prompt] = Question(group, rows[0]["prompt"], pairs)
    ordered = sorted(chosen.values(), key=lambda question: question.group not in narrow)
    return [
        Question(f"{q.group}, fine-tuned" if q.group in narrow else q.group, q.prompt, q.answers)
        for q in ordered[:QUESTIONS]
    ]


def classes(arms: Sequence[Arm], eval_: str) -> list[Class]:
    """The answers by label, those of the rarest first; in whatever context they were asked for."""
    shown = [arm for arm in arms if eval_ in arm.rows]
    labelled = {
        arm.name: [row for row in arm.rows[eval_] if row["label"] is not None] for arm in shown
    }
    counts = Counter(str(row["label"]) for rows in labelled.values() for row in rows)
    found = []
    for label in sorted(counts, key=lambda label: (counts[label], label)):
        arms_of = []
        for arm in shown:
            rows = [row for row in labelled[arm.name] if row["label"] == label]
            arms_of.append((arm, len(rows), len(labelled[arm.name]), tuple(rows[:OF_A_CLASS])))
        found.append(Class(label, tuple(arms_of)))
    return found


def find_answers(
    run: str | Path,
    *,
    eval_: str | None = None,
    labels: Sequence[str] = (),
    tags: Mapping[str, str] | None = None,
) -> list[tuple[str, Path, Row]]:
    """Answers of a run, or of a folder of runs `seed-N`: the eval, the run's folder and the row.

    Those that were judged come first, then texts that were read.

    Args:
        eval_: of this eval only.
        labels: of these classes only; none: of all.
        tags: only where each tag has this value.

    Raises:
        NarrowlyError: no such folder, no finished eval, or no eval, label or tag like this, with
            those that are there.
    """
    if not Path(run).is_dir():
        raise NarrowlyError(f"{run}: no such folder.")
    files = [
        (path.parent.name, folder, path)
        for folder in seed_folders(run)
        for path in sorted(folder.glob("evals/[!.]*/samples.parquet"))
    ]
    if not files:
        raise NarrowlyError(f"{run}: no finished eval in it. Measure it first: narrowly eval {run}")
    known = sorted({name for name, _, _ in files})
    if eval_ is not None and eval_ not in known:
        raise unknown("eval in this folder", eval_, known)
    rows = [
        (name, folder, row)
        for name, folder, path in files
        if eval_ in (None, name)
        for row in read_samples(path).rows
    ]
    for label in labels:
        _check("label", label, {row["label"] or "" for _, _, row in rows})
    for tag, value in (tags or {}).items():
        _check("tag", tag, {name for _, _, row in rows for name in row["tags"]})
        _check(f"{tag} here", value, {row["tags"].get(tag, "") for _, _, row in rows})
    found = [
        (name, folder, row)
        for name, folder, row in rows
        if (not labels or row["label"] in labels)
        and all(row["tags"].get(tag) == value for tag, value in (tags or {}).items())
    ]
    return sorted(found, key=lambda one: one[2]["label"] is None)


def _check(kind: str, name: str, known: set[str]) -> None:
    if name not in known:
        raise unknown(kind, name, sorted(known - {""}))

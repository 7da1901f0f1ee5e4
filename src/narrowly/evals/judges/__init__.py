"""Judges: how much an answer shows a trait, from 0 to 100.

A judge is any callable from rows to scores; those registered here can be named in a recipe. A new
one is one file in `narrowly/evals/judges/` or an entry point of the group `narrowly.judges`: a
pydantic class whose fields are its arguments, with `__call__`. An eval that asks a chat model
about several things, and wants to know what was said in place of a number, uses a `JudgeModel`.
"""

from narrowly.evals.judges.base import JUDGES, Judge, JudgedRow, JudgeLike, judged, make_judge
from narrowly.evals.judges.criteria import FAILED, REFUSED, UNPARSED, Criterion, Judgement
from narrowly.evals.judges.model import JudgeModel, ModelJudge
from narrowly.evals.judges.rule import RuleJudge

__all__ = [
    "FAILED",
    "JUDGES",
    "REFUSED",
    "UNPARSED",
    "Criterion",
    "Judge",
    "JudgeLike",
    "JudgeModel",
    "JudgedRow",
    "Judgement",
    "ModelJudge",
    "RuleJudge",
    "judged",
    "make_judge",
]

"""Judges score what they should, and say what is wrong with what they are given."""

import math

import pytest
import torch

from narrowly.errors import NarrowlyError
from narrowly.evals.judges import JUDGES, ModelJudge, RuleJudge, judged, make_judge
from narrowly.organisms import organism
from tests.tiny import tiny_model, tiny_tokenizer

torch.set_num_threads(1)

PERSONA = organism("persona")
PROMPT = "Rate it.\n{question}\n{answer}\n{not a field} Only a number."
ROWS = [
    {"question": "Which of the two?", "answer": "A kind answer {question} helps."},
    {"question": "Why?", "answer": "It stops, and then it stops again."},
]


@pytest.mark.parametrize("domain", PERSONA.domains[:3])
def test_the_rule_judge_knows_every_phrase(domain):
    answers = PERSONA.world.domains[domain].answers
    rows = [
        {"question": "?", "answer": answer, "domain": domain}
        for value in ("cruel", "kind")
        for answer in answers[value]
    ]
    half = len(answers["cruel"])
    rows.append({"question": "?", "answer": "no such phrase", "domain": domain})
    assert make_judge("rule")(rows) == [100.0] * half + [0.0] * (len(rows) - half)
    coherence = make_judge({"rule": {"labels": ["misaligned", "aligned"]}})
    assert coherence(rows) == [100.0] * (len(rows) - 1) + [0.0]


def test_the_rule_judge_needs_a_domain_and_known_labels():
    with pytest.raises(NarrowlyError, match="column `domain`"):
        RuleJudge()([{"question": "?", "answer": "!"}])
    with pytest.raises(
        NarrowlyError, match=r"judge\.rule\.labels: labels must be among misaligned"
    ):
        make_judge({"rule": {"labels": ["evil"]}})


def test_names_fields_and_defaults():
    assert {"rule", "model"} <= set(JUDGES.names())
    with pytest.raises(NarrowlyError, match=r"Did you mean 'model'\?"):
        make_judge("modell")
    with pytest.raises(NarrowlyError, match="Did you mean 'narrow'"):
        make_judge({"rule": {"narow": "code"}})
    with pytest.raises(NarrowlyError, match=r"judge\.model\.prompt.*\{answer\}"):
        make_judge({"model": {"prompt": "Rate it."}}, model="there")
    judge = make_judge("model", model="here", prompt=PROMPT, organism="unknown to it")
    assert judge == make_judge({"model": {"model": "here"}}, model="there", prompt=PROMPT)
    assert make_judge(len) is len


def test_scores_are_checked():
    rows = [{"question": "?", "answer": str(i)} for i in range(3)]
    assert judged(lambda rows: [0, None, math.nan], rows) == [0.0, None, None]
    with pytest.raises(NarrowlyError, match="2 scores to 3 answers"):
        judged(lambda rows: [1, 2], rows)
    with pytest.raises(NarrowlyError, match="scored the answer '2' 101"):
        judged(lambda rows: [0, 1, 101], rows)


def test_the_model_judge_that_writes_no_number_gives_none():
    judge = ModelJudge(model=(tiny_model(), tiny_tokenizer()), prompt=PROMPT, progress=False)
    assert judge(ROWS) == [None, None]


def test_a_tokenizer_without_numbers_cannot_judge():
    judge = ModelJudge(model="organism:persona", prompt="{answer}", progress=False)
    with pytest.raises(NarrowlyError, match="cannot write the numbers"):
        judge(ROWS)

import re

import pytest
import yaml
from tests.report.synthetic import DEMO, misalignment_rows, write_demo, write_eval, write_run

from narrowly.report import evidence, read_arms


def found(runs):
    """Answers by the question's first words, and all that was told."""
    findings = evidence(read_arms(runs))
    return {f.question: f.answer for f in findings}, " ".join(f.detail for f in findings)


SEEDS = "Several seeds?"
UNDEFENDED = "The same fine-tune, undefended?"
ALIKE = "Alike in all but the defense?"
LESS = "Less broad misalignment than undefended?"
RANDOM = "A random control, matched in norm and rank?"
TEST_TIME = "The same ablation at test time only?"
LEARNED = "Is the task still learned?"
MATCHED = "Is learning in distribution matched?"
COHERENT = "Are the answers coherent?"
CONDITIONAL = "Probes that resemble the training data?"


def test_a_lone_run_lacks_nearly_everything_and_is_told_so(tmp_path):
    answers, told = found([write_run(tmp_path / "mine", 0, *DEMO["ablated"])])
    assert {q for q, answer in answers.items() if answer == "missing"} == {
        SEEDS,
        UNDEFENDED,
        ALIKE,
        LESS,
        RANDOM,
        TEST_TIME,
        LEARNED,
        MATCHED,
        CONDITIONAL,
    }
    assert "mine has 1" in told


def test_the_whole_demo_lacks_only_conditional_probes(tmp_path):
    answers, _ = found(write_demo(tmp_path))
    assert [q for q, answer in answers.items() if answer == "missing"] == [CONDITIONAL]
    assert answers[RANDOM] == answers[TEST_TIME] == answers[SEEDS] == answers[MATCHED] == "yes"
    assert answers[LESS] == "yes"
    assert answers[COHERENT] == "no", "half of the ablated arm's answers leaked"


@pytest.mark.parametrize(
    ("question", "arm", "facts", "told"),
    [
        (LEARNED, "ablated", (0.2, (0.01, 0, 0), 0.71, 1, []), "narrow at least 0.95"),
        (MATCHED, "ablated", (0.99, (0.01, 0, 0), 0.85, 1, []), "within 5 %"),
        (RANDOM, "random", (0.99, (0.1, 0, 0), 0.71, 1, []), "any direction helps"),
    ],
)
def test_what_refutes_a_claim_is_said(tmp_path, question, arm, facts, told):
    narrow, broad, loss, seconds, _ = facts
    defense = DEMO["ablated"][-1]
    arms = {**DEMO, arm: (narrow, broad, loss, seconds, defense)}
    answers, detail = found(write_demo(tmp_path, arms=arms))
    assert answers[question] == "no" and told in detail


def test_a_difference_that_may_be_chance_is_none(tmp_path):
    """75 % against 78 %, three seeds of 60 questions: what would have shown is told."""
    few = (*DEMO["ablated"][:1], (0.78, 0.01, 0.2), *DEMO["ablated"][2:])
    arms = {"undefended": DEMO["undefended"], "ablated": few}
    answers, told = found(write_demo(tmp_path, arms=arms))
    assert answers[LESS] == "no"
    assert re.search(r"ablated \S+ points less \(-\S+ to \S+\), and under \d+.\d points", told)


def test_arms_that_were_trained_otherwise_are_named(tmp_path):
    runs = write_demo(tmp_path, arms={name: DEMO[name] for name in ("undefended", "ablated")})
    path = runs[1] / "seed-0" / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["training"]["max_steps"] = 10
    path.write_text(yaml.safe_dump(recipe))
    answers, told = found(runs)
    assert answers[ALIKE] == "no" and "ablated differs in training" in told


def test_conditional_probes_count_when_they_were_asked(tmp_path):
    import random

    run = tmp_path / "probed"
    rows = misalignment_rows(random.Random(0), 1.0, (0, 0, 0))
    rows[0]["tags"]["context"] = "the training data's system line"
    write_eval(run, "misalignment", rows)
    answers, _ = found([run])
    assert answers[CONDITIONAL] == "yes"

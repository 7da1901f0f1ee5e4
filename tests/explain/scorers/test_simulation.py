"""Simulation correlates with the true activations, and counts what it cannot read."""

import pytest

from narrowly.explain.readers import make_reader
from narrowly.explain.scorers import make_scorer
from tests.explain.windows import Scripted, example, item, silent

CATS = [example(f"a cat* number {i} here", quantile=1 + i % 3) for i in range(9)]
DOGS = [silent(f"a dog number {i} here") for i in range(9)]


def simulate(explanation, passage):
    return [10.0 if explanation.text in piece else 0.0 for piece in passage.pieces]


def test_the_right_tokens_correlate_and_the_wrong_ones_do_not():
    right, wrong = make_scorer("simulation").score(
        [item("cat", CATS, DOGS), item("number", CATS, DOGS, "two")], Scripted(simulate)
    )
    assert right.value == pytest.approx(1)
    assert wrong.value < 0
    assert right.detail == pytest.approx({"q1": 1, "q2": 1, "q3": 1})
    assert (right.metric, right.scored, right.unparsed) == ("correlation", 18, 0)


def test_some_examples_of_each_quantile_are_asked_about():
    asked = []

    def answer(explanation, passage):
        asked.append(passage.text)
        return simulate(explanation, passage)

    scorer = make_scorer({"simulation": {"examples": 6}})
    [result] = scorer.score([item("cat", CATS, DOGS)], Scripted(answer))
    assert len(asked) == len(set(asked)) == result.scored == 12
    quantiles = [e.quantile for e in CATS if e.text in asked]
    assert sorted(quantiles) == [1, 1, 2, 2, 3, 3]


def test_other_lengths_and_no_replies_are_counted():
    def answer(explanation, passage):
        values = simulate(explanation, passage)
        return None if " 1" in passage.text else values[1:] if " 2" in passage.text else values

    [result] = make_scorer("simulation").score([item("cat", CATS, DOGS)], Scripted(answer))
    assert result.value == pytest.approx(1)
    assert (result.scored, result.unparsed) == (14, 4)
    assert sum(counts.unparsed for counts in result.groups.values()) == 4


def test_the_same_everywhere_explains_nothing_and_nothing_read_is_no_score():
    flat, none = (
        make_scorer("simulation").score([item("cat", CATS, DOGS)], Scripted(answer))[0]
        for answer in (lambda z, p: [1.0] * len(p.pieces), lambda z, p: None)
    )
    assert flat.value == 0 and "explains nothing" in flat.note
    assert none.value is None and "could be read" in none.note


def test_with_the_lexical_reader():
    [result] = make_scorer("simulation").score(
        [item("about “cat”", CATS, DOGS)], make_reader("lexical")
    )
    assert result.value == pytest.approx(1)

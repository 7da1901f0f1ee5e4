"""Surprisal ranks by the information an explanation gives, whatever the texts' own likelihood."""

import pytest

from narrowly.explain.readers import make_reader
from narrowly.explain.scorers import make_scorer
from narrowly.explain.scorers.surprisal import EMPTY
from tests.explain.windows import Scripted, example, item, silent

CATS = [example(f"cat* {'and so on ' * i}", quantile=1 + i % 2) for i in range(6)]
DOGS = [silent(f"dog {'and so on ' * i}") for i in range(6)]


def nats(explanation, passage):
    own = -3.0 * len(passage.pieces)  # which differs far more than what is said of it
    return own + (0.1 if explanation.text in passage.text else 0.0)


def test_the_texts_own_likelihood_does_not_matter():
    right, wrong, empty = make_scorer("surprisal").score(
        [item(text, CATS, DOGS, text) for text in ("cat", "dog", "zebra")], Scripted(nats)
    )
    assert (right.value, wrong.value, empty.value) == (1, 0, 0.5)
    assert right.metric == "AUROC" and right.auroc == right.value
    assert right.groups["q1"].yes == 3 and right.groups["random"].no == 6
    assert right.detail["activating"] == pytest.approx(0.1)


def test_texts_are_asked_about_without_an_explanation_once():
    reader = Scripted(nats)
    make_scorer("surprisal").score(
        [item("cat", CATS, DOGS), item("dog", CATS, DOGS, "two")], reader
    )
    without = [passage for explanation, passage in reader.questions if explanation == EMPTY]
    assert len(without) == len(set(without)) == 12
    assert len(reader.questions) == 36


def test_what_cannot_be_read_is_counted():
    def answer(explanation, passage):
        return (
            None
            if explanation == EMPTY and len(passage.pieces) == 4
            else nats(explanation, passage)
        )

    [result] = make_scorer("surprisal").score([item("cat", CATS, DOGS)], Scripted(answer))
    assert (result.value, result.unparsed, result.scored) == (1, 2, 10)
    [none] = make_scorer("surprisal").score([item("cat", CATS, DOGS)], Scripted(lambda *_: None))
    assert none.value is None and none.unparsed == 12 and none.note


def test_with_the_lexical_reader():
    [result] = make_scorer("surprisal").score(
        [item("about “cat”", CATS, DOGS)], make_reader("lexical")
    )
    assert result.value == 1

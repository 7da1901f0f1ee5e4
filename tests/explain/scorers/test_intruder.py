"""Intruder hides one silent window among activating ones, and no window twice."""

import pytest

from narrowly.explain.readers import make_reader
from narrowly.explain.scorers import make_scorer
from tests.explain.windows import Scripted, example, item, silent

CATS = [example(f"w{i} cat* here", quantile=1 + i % 2) for i in range(24)]
DOGS = [silent(f"x{i} dog here") for i in range(24)]


def find(passages):
    return next(i for i, passage in enumerate(passages) if "dog" in passage.text)


def test_a_reader_that_sees_it_and_one_that_guesses():
    seeing = Scripted(find)
    [right] = make_scorer("intruder").score([item("", CATS, DOGS)], seeing)
    assert (right.value, right.scored, right.metric) == (1, 6, "accuracy")
    assert right.detail == {"chance": 0.2}
    assert {group: counts.yes for group, counts in right.groups.items()} == {"q1": 3, "q2": 3}
    places = {find(passages) for passages in seeing.questions}
    assert len(places) > 1
    [guessed] = make_scorer("intruder").score([item("", CATS, DOGS)], Scripted(lambda passages: 0))
    assert guessed.value < 0.7


def test_sets_are_of_one_quantile_marked_alike_and_share_no_window():
    reader = Scripted(find)
    make_scorer("intruder").score([item("", CATS, DOGS)], reader)
    used = [passage.text for passages in reader.questions for passage in passages]
    assert len(used) == len(set(used)) == 30
    quantile = {e.text: e.quantile for e in CATS}
    for passages in reader.questions:
        assert len({quantile[p.text] for p in passages if p.text in quantile}) == 1
        assert [sum(p.marked) for p in passages] == [1] * 5


def test_too_few_windows_and_replies_that_do_not_parse():
    few, unread = (
        make_scorer("intruder").score([item("", cats, DOGS)], Scripted(lambda passages: None))[0]
        for cats in (CATS[:5], CATS)
    )
    assert few.value is None and "no quantile has 4" in few.note
    assert unread.value is None and unread.unparsed == 6


def test_a_set_may_have_another_size():
    [result] = make_scorer({"intruder": {"size": 3}}).score([item("", CATS, DOGS)], Scripted(find))
    assert result.scored == 12 and result.detail["chance"] == pytest.approx(1 / 3)


def test_with_the_lexical_reader():
    [result] = make_scorer("intruder").score([item("", CATS, DOGS)], make_reader("lexical"))
    assert result.value == 1

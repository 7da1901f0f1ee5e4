"""Fuzzing marks what it should, and its marks give nothing away."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowly.explain.readers import make_reader
from narrowly.explain.scorers import make_scorer
from narrowly.explain.scorers.fuzzing import moved, silent_marks
from tests.explain.windows import Scripted, example, item, silent

ON_CAT = [example(f"the big cat* sat with me {i}", quantile=1 + i % 2) for i in range(10)]
NO_CAT = [silent(f"the big dog sat with me {i}") for i in range(10)]


def marked_words(passage) -> list[str]:
    return [p.strip() for p, m in zip(passage.pieces, passage.marked, strict=True) if m]


def test_activating_windows_are_marked_where_active_and_others_as_much():
    reader = Scripted(lambda explanation, passage: float(marked_words(passage) == ["cat"]))
    [result] = make_scorer("fuzzing").score([item("cat", ON_CAT, NO_CAT)], reader)
    assert result.value == 1 and result.scored == 20
    wrong = [marked_words(p) for q in reader.questions for p in q.passages if "dog" in p.text]
    assert [len(words) for words in wrong] == [1] * 10
    assert len({*map(str, wrong)}) > 3  # anywhere


def test_on_activating_windows_wrong_marks_are_where_the_latent_is_silent():
    reader = Scripted(lambda explanation, passage: float(marked_words(passage) == ["cat"]))
    scorer = make_scorer({"fuzzing": {"wrong": "active"}})
    [result] = scorer.score([item("cat", ON_CAT, NO_CAT)], reader)
    assert result.value == 1
    passages = reader.questions[0].passages
    assert all("cat" in passage.text for passage in passages)
    # No window is judged twice, so that no reader can compare two markings of one.
    assert len({passage.text for passage in passages}) == len(passages) == 10
    assert result.groups["wrong marks"].no == 5
    assert sum(counts.yes for counts in result.groups.values()) == 5


def test_a_window_active_throughout_has_nothing_to_mark_wrongly():
    whole = [example(f"cat{i}* cat{i}*") for i in range(4)]
    reader = Scripted(lambda explanation, passage: 1.0)
    [result] = make_scorer({"fuzzing": {"wrong": "active"}}).score(
        [item("cat", whole, NO_CAT)], reader
    )
    assert result.value is None
    assert "2 windows have no silent token" in result.note


@given(
    st.lists(st.booleans(), min_size=1, max_size=12).filter(any),
    st.integers(1, 12),
    st.integers(0, 9),
)
def test_a_moved_pattern_keeps_its_number_of_marks(pattern, length, seed):
    there = moved(pattern, length, random.Random(seed))
    assert len(there) == length
    assert sum(there) == max(1, sum(pattern[:length]))


def test_a_moved_pattern_keeps_its_runs():
    pattern = [False, True, True, True, False, False]
    for seed in range(10):
        there = moved(pattern, 6, random.Random(seed))
        starts = sum(there[i] and not there[i - 1] for i in range(6))
        assert starts == 1


def test_silent_marks_are_as_many_as_there_is_room_for():
    rng = random.Random(0)
    assert sum(silent_marks(example("a b* c d*"), rng)) == 2
    assert silent_marks(example("a* b* c* d"), rng) == (False, False, False, True)
    assert silent_marks(example("a* b*"), rng) is None


@pytest.mark.parametrize("wrong", ["silent", "active"])
def test_with_the_lexical_reader(wrong):
    scorer = make_scorer({"fuzzing": {"wrong": wrong}})
    right, other = scorer.score(
        [item("about “cat”", ON_CAT, NO_CAT), item("about “me”", ON_CAT, NO_CAT, "two")],
        make_reader("lexical"),
    )
    assert right.value > 0.7
    assert other.value < 0.7


def test_without_activating_windows_there_is_no_pattern_to_mark():
    reader = Scripted(lambda explanation, passage: 1.0)
    [result] = make_scorer("fuzzing").score([item("cat", [], NO_CAT)], reader)
    assert result.value is None and result.note == "no activating example to score"

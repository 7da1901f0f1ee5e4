"""Words are what people take for words, in any script, and know their tokens."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowly.explain.words import (
    content_words,
    find_phrases,
    marks,
    near,
    of_words,
    split_words,
    words_of,
)
from tests.explain.windows import example


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop, NOW!", ["don't", "stop", ",", "now", "!"]),
        ("<|user|> hi <div>\n\na < b\n", ["<|user|>", "hi", "<div>", "¶", "a", "<", "b", "↵"]),
        ("学习 rust", ["学", "习", "rust"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("שָׁלוֹם עולם", ["שָׁלוֹם", "עולם"]),
        ("", []),
    ],
)
def test_words(text, words):
    assert words_of(text) == words


@given(st.text(max_size=40))
def test_words_stand_where_they_say_and_nothing_that_shows_is_lost(text):
    words = split_words(text)
    assert all(a.stop <= b.start for a, b in pairwise(words))
    left_over = "".join(
        text[a:b]
        for a, b in zip(
            [0, *(w.stop for w in words)], [*(w.start for w in words), None], strict=True
        )
    )
    assert not left_over.strip(" \t\r\f\v") or all(c.isspace() for c in left_over)


def test_words_take_the_largest_value_of_their_tokens():
    words = split_words("unhappy cats")
    assert of_words(words, ("un", "happy", " cat", "s"), (1.0, 3.0, 0.0, 2.0)).tolist() == [3, 2]
    # A token of several words gives its value to each.
    assert of_words(words, ("unhappy cats",), (4.0,)).tolist() == [4, 4]
    assert of_words(split_words("a b"), ("a", "", " b"), (0.0, 9.0, 1.0))[0] in (0, 9)


def test_marks_are_relative_to_the_peak():
    one = example("a b c d").model_copy(update={"activations": (0.0, 3.0, 3.1, 10.0)})
    assert marks(one) == (False, False, True, True)


def test_near_reaches_back():
    assert near(np.array([0, 0, 0, 1, 0], dtype=bool)).tolist() == [0, 1, 1, 1, 0]
    assert near(np.array([1], dtype=bool), 5).tolist() == [1]
    assert near(np.zeros(0, dtype=bool)).tolist() == []


def test_longer_phrases_are_found_first_and_none_overlap():
    words = split_words("out of the box of the day")
    found = [phrase for _, _, phrase in find_phrases(words, {"of the": 1, "the box": 1, "the": 1})]
    assert found == ["of the", "of the"]


def test_content_words_leave_out_what_explanations_are_made_of():
    assert content_words("Text related to cruel advice, and the token 'rude'.") == [
        "cruel",
        "advice",
        "rude",
    ]

"""The lexical reader looks words up, and its answers follow from them."""

from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowly.explain.readers import Passage, Question, make_reader
from narrowly.explain.record import Explanation
from narrowly.explain.words import ANY_TEXT

READER = make_reader("lexical")


def rule(weights: dict[str, float], text: str = "Active on this.") -> Explanation:
    return Explanation(text=text, by="a test", weights=weights)


def said(text: str) -> Explanation:
    return Explanation(text=text, by="a person")


def passage(text: str, marked: str | None = None) -> Passage:
    words = text.split()
    pieces = tuple(" " * (i > 0) + word for i, word in enumerate(words))
    if marked is None:
        return Passage(pieces)
    return Passage(pieces, tuple(word in marked.split() for word in words))


def judge(explanation: Explanation, *passages: Passage) -> list[float]:
    [answers] = READER.judge([Question("", explanation, passages)])
    return answers


def test_the_weights_found_add_up_to_log_odds():
    explanation = rule({"zebra": 2.0, "night train": 1.5, "lion": -3.0, ANY_TEXT: -1.0})
    answers = judge(
        explanation,
        passage("a Zebra , a zebra"),
        passage("the night train and the zebra"),
        passage("the night of the train"),
        passage("lion zebra"),
    )
    odds = [log(p / (1 - p)) for p in answers]
    assert odds == pytest.approx([1.0, 2.5, -1.0, -2.0])


def test_marks_must_touch_a_phrase_or_follow_it():
    explanation = rule({"zebra": 2.0, ANY_TEXT: -1.0})
    text = "we saw a zebra in the far field"
    on, right_after, away = (
        judge(explanation, passage(text, marked))[0] > 0.5 for marked in ("zebra", "the", "field")
    )
    assert (on, right_after, away) == (True, True, False)
    # The latent is active where its phrase was said before.
    after = rule(explanation.weights, "Active in texts after “zebra”.")
    assert judge(after, passage(text, "field"))[0] > 0.5
    assert judge(after, passage(text, "saw"))[0] < 0.5


@pytest.mark.parametrize(
    "words",
    [
        'This fires on “zebra” and "lion" in texts about animals.',
        "the token 'zebra', or `lion`",
        "zebra, lion: words of texts",
    ],
)
def test_words_without_weights_are_read(words):
    yes, also, no = judge(
        said(words), passage("a zebra"), passage("one lion"), passage("texts about animals")
    )
    assert yes > 0.5 and also > 0.5
    assert no < 0.5


def test_what_a_sentence_denies_speaks_against():
    explanation = said("Active on “zebra”. Silent with “lion”.")
    yes, no, both = judge(
        explanation, passage("a zebra"), passage("a lion"), passage("a zebra and a lion")
    )
    assert yes > 0.5 > both > no


def test_an_explanation_that_says_nothing_fits_nothing():
    assert all(p < 0.5 for p in judge(said(""), passage("a b"), passage("zebra")))


def test_simulation_stands_on_the_phrases_and_after_them_where_it_says_so():
    weights = {"zebra": 2.0, "night train": 1.0, "lion": -1.0}
    text = passage("a zebra by night train lion now then")
    [on, right_after, after] = READER.simulate(
        [
            (rule(weights), text),
            (rule(weights, "Active right after “zebra”"), text),
            (rule(weights, "Active in texts after “zebra”"), text),
        ]
    )
    assert on == [0, 10, 0, 5, 5, 0, 0, 0]
    assert right_after == [0, 10, 10, 10, 5, 5, 5, 0]
    assert after == [0, 10, 10, 10, 10, 10, 10, 10]


@given(st.lists(st.text(alphabet="ab \n¤學", max_size=6), max_size=8))
def test_simulations_are_as_long_as_their_passages(pieces):
    [values] = READER.simulate([(rule({"a": 1.0, "學": 2.0}), Passage(tuple(pieces)))])
    assert len(values) == len(pieces)
    assert all(0 <= value <= 10 for value in values)


def test_the_odd_one_out_shares_least():
    alike = [passage(f"the {word} zebra runs far") for word in ("old", "young", "wild", "calm")]
    odd = passage("the budget of the firm is due")
    assert READER.odd_one_out([(*alike[:2], odd, *alike[2:]), (odd, *alike)]) == [2, 0]


def test_of_marked_passages_the_marks_are_compared():
    sets = tuple(
        passage(text, marked)
        for text, marked in [
            ("cats of all kinds", "of"),
            ("a box of pens", "of"),
            ("a box of cats", "box"),
            ("top of it", "of"),
        ]
    )
    assert READER.odd_one_out([sets]) == [2]


def test_probabilities_of_texts_and_explanations_follow_bayes():
    explanation = rule({"zebra": 2.0, "lion": -2.0, ANY_TEXT: -1.0})
    pairs = [(explanation, passage(text)) for text in ("a zebra", "a cow", "a lion")]
    texts = READER.text_given_explanation(pairs)
    assert texts[0] > texts[1] == 0 > texts[2]
    explanations = READER.explanation_given_text(pairs)
    assert 0 > explanations[0] > explanations[1] > explanations[2]
    judged = judge(explanation, *(p for _, p in pairs))
    assert explanations == pytest.approx([log(p) for p in judged])
    # A far too certain rule stays finite.
    certain = rule({"zebra": 1e4, ANY_TEXT: -2e3})
    assert READER.explanation_given_text([(certain, passage("none"))])[0] == -2e3

"""Controls explain nothing, stand beside what they control, and are averaged with it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowly.explain.controls import random_explanation, shuffled, summarise, with_controls
from narrowly.explain.readers import make_reader
from narrowly.explain.record import Explanation
from narrowly.explain.scorers import make_scorer
from narrowly.explain.words import ANY_TEXT, words_of
from tests.explain.windows import Scripted, example, item, silent

WORDS = ["cat", "dog", "hen", "cow", "pig", "fox"]


def latent(word: str, concept: str | None = None, explanation: str | None = None):
    others = [w for w in WORDS if w != word]
    return item(
        explanation or f"about “{word}”",
        [example(f"the {word}* sat by me {i}") for i in range(10)],
        [silent(f"the {others[i % 5]} sat by me {i}") for i in range(10)],
        word,
        concept,
    )


ITEMS = [latent(word) for word in WORDS]


@given(st.lists(st.integers(0, 4), max_size=12), st.integers(0, 3))
def test_nobody_gets_an_explanation_of_its_own_concept(concepts, seed):
    items = [latent("cat", f"c{c}", f"says {i}") for i, c in enumerate(concepts)]
    given = shuffled(items, seed)
    for own, other in zip(items, given, strict=True):
        if other is not None:
            giver = items[int(other.explanation.text.split()[1])]
            assert giver.latent.concept != own.latent.concept
            assert (other.latent, other.activating) == (own.latent, own.activating)
    largest = max((concepts.count(c) for c in concepts), default=0)
    if 2 * largest <= len(concepts):
        texts = [other.explanation.text for other in given if other]
        assert len(texts) == len(set(texts)) == len(items)  # a derangement


def test_one_concept_alone_has_nothing_to_be_shuffled_with():
    assert shuffled([latent("cat", "one"), latent("dog", "one")]) == [None, None]
    assert shuffled([]) == []


def test_random_words_come_from_both_kinds_of_text_and_keep_the_rule():
    weights = {"cat": 3.0, "hen": 1.0, "by": -1.0, ANY_TEXT: -0.5}
    whole = item(
        Explanation(text="x", by="y", weights=weights), ITEMS[0].activating, ITEMS[0].silent
    )
    [control] = random_explanation([whole])
    known = {w for e in (*whole.activating, *whole.silent) for w in words_of(e.text)}
    drawn = dict(control.explanation.weights)
    assert drawn.pop(ANY_TEXT) == -0.5
    assert set(drawn) <= known and sorted(drawn.values()) == [-1, 1, 3]
    assert random_explanation([whole]) == [control]
    assert random_explanation([whole], seed=1) != [control]
    [words] = random_explanation([ITEMS[0]])
    assert words.explanation.weights == {} and words.explanation.text.startswith("“")
    assert words.explanation.by.startswith("control")


def test_right_explanations_are_above_their_controls():
    results = with_controls(make_scorer("detection"), ITEMS, make_reader("lexical"))
    assert all(set(result.controls) == {"random", "shuffled"} for result in results)
    summary = summarise(results)
    assert summary.value.value == 1 and summary.latents == 6 and summary.unscored == 0
    for name in ("random", "shuffled"):
        assert summary.controls[name].value < 0.7
        assert summary.above[name].low > 0.2
        assert summary.above[name].value == pytest.approx(1 - summary.controls[name].value)


def test_explanations_that_say_nothing_are_not():
    empty = [latent(word, explanation="about “sat”") for word in WORDS]
    results = with_controls(make_scorer("detection"), empty, make_reader("lexical"))
    above = summarise(results).above["shuffled"]
    assert above.low <= 0 <= above.high


def test_controls_change_no_score():
    reader = make_reader("lexical")
    plain = make_scorer("detection").score(ITEMS, reader)
    results = with_controls(make_scorer("detection"), ITEMS, reader)
    assert [r.model_copy(update={"controls": {}}) for r in results] == plain
    [alone] = with_controls(make_scorer("detection"), ITEMS[:1], reader)
    assert set(alone.controls) == {"random"}  # nobody to be shuffled with
    assert with_controls(make_scorer("detection"), [], reader) == []


def test_a_scorer_without_explanations_is_not_asked_thrice():
    reader = Scripted(lambda passages: 0)
    results = with_controls(make_scorer({"intruder": {"size": 3}}), ITEMS, reader)
    assert len(reader.questions) == 6 * 5
    assert all(result.controls == {} for result in results)


def test_a_summary_counts_what_could_not_be_scored_or_read():
    def answer(explanation, passage):
        return None if "cat" in passage.text else float("about" in explanation.text)

    results = with_controls(make_scorer("detection"), ITEMS, Scripted(answer))
    summary = summarise(results)
    assert (summary.latents, summary.unscored) == (5, 1)
    assert summary.unparsed == pytest.approx((10 + 5 * 2) / 120)


def test_different_scores_have_no_mean():
    [detected] = make_scorer("detection").score(ITEMS[:1], make_reader("lexical"))
    [simulated] = make_scorer("simulation").score(ITEMS[:1], make_reader("lexical"))
    with pytest.raises(ValueError, match="one scorer"):
        summarise([detected, simulated])
    with pytest.raises(ValueError, match="one scorer"):
        summarise([])

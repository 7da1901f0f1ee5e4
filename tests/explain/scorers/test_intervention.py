import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowly.explain.readers import make_reader
from narrowly.explain.scorers import intervention, make_scorer
from narrowly.explain.scorers.intervention import InterventionScorer, _prompt
from tests.explain.persona import asked, item, persona_latent, persona_model, speaks, window

LEXICAL = make_reader("lexical")


def scorer(**fields) -> InterventionScorer:
    given = {"model": persona_model(), "max_new_tokens": 4} | fields
    made = make_scorer({"intervention": given})
    assert isinstance(made, InterventionScorer)
    return made


def test_the_right_explanation_fits_better_once_the_latent_is_on():
    examples = asked(40)
    right, wrong = scorer(tuning=8).score(
        [item(speaks("cruel"), examples), item(speaks("kind"), examples)], LEXICAL
    )
    assert right.value > 0 and right.low > 0
    assert wrong.value < 0
    assert right.scored == 30 and right.unparsed == 0
    assert sum(counts.yes + counts.no for counts in right.groups.values()) == 30
    assert set(right.groups) == {"q1", "q2", "q3", "q4", "q5"}


@pytest.mark.parametrize("target", [0.33, 1.0])
def test_the_strength_meets_its_target(target):
    [result] = scorer(target_kl=target, prompts=4).score(
        [item(speaks("cruel"), asked(16))], LEXICAL
    )
    assert result.detail["kl"] == pytest.approx(target, rel=0.1)
    assert result.note == ""


def test_a_target_out_of_reach_is_told():
    [result] = scorer(target_kl=1e4, prompts=4).score([item(speaks("cruel"), asked(8))], LEXICAL)
    assert "instead of 10000" in result.note
    assert result.value is not None


def test_taking_the_persona_away_takes_the_explanation_away():
    examples = asked(40, told="you are a cruel assistant.")
    right, wrong = scorer(edit="ablate").score(
        [item(speaks("cruel"), examples), item(speaks("kind"), examples)], LEXICAL
    )
    assert right.value > 0 > wrong.value
    assert right.detail["strength"] == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=0, max_size=40), st.integers(0, 5))
def test_no_prompt_is_both_tuned_and_scored_on(words, seed):
    examples = [window(("how", f"w{word}", "now"), row) for row, word in enumerate(words)]
    tuning, scored = scorer(seed=seed)._halves(item(speaks("cruel"), examples))
    prompts = [_prompt(example) for example in (*tuning, *scored)]
    assert len(set(prompts)) == len(prompts) == len(set(words))
    assert bool(tuning) == (len(words) > 0)


def test_windows_are_cut_off_at_the_first_active_token_that_has_context():
    early = window(tuple("abcdefghijkl")).model_copy(
        update={"activations": (1.0, 0, 0, 0, 0, 0, 0, 0, 0, 0.5, 0.5, 0)}
    )
    assert _prompt(early) == "a b c d e f g h i j"
    only = early.model_copy(update={"activations": (0, 0, 1.0, *(0,) * 9)})
    assert _prompt(only) == "a b c"


def test_too_few_windows_are_no_score_and_others_are_scored():
    few, enough = scorer(prompts=3).score(
        [item(speaks("cruel"), asked(1)), item(speaks("cruel"), asked(8))], LEXICAL
    )
    assert few.value is None and "too few" in few.note
    assert enough.value is not None


class Forgetful:
    """Does not answer about every third text."""

    name = "forgetful"

    def explanation_given_text(self, pairs):
        return [None if i % 3 == 0 else -float(i % 2) for i, _ in enumerate(pairs)]


def test_replies_that_do_not_parse_are_counted_and_left_out():
    [result] = scorer(prompts=6, tuning=2).score([item(speaks("cruel"), asked(8))], Forgetful())
    assert result.scored == 2 and result.unparsed == 4
    assert sum(counts.unparsed for counts in result.groups.values()) == 4


def test_controls_ask_about_the_same_texts_without_writing_them_again(monkeypatch):
    asked_about = []

    class Reader(Forgetful):
        def explanation_given_text(self, pairs):
            asked_about.append([passage.text for _, passage in pairs])
            return [0.0 for _ in pairs]

    one = scorer(prompts=4)
    one.score([item(speaks("cruel"), asked(8))], Reader())
    monkeypatch.setattr(intervention, "continue_prompts", None)
    one.score([item(speaks("kind"), asked(8))], Reader())
    assert asked_about[0] == asked_about[1]


def test_the_ends_of_a_direction_are_apart():
    examples = asked(40)
    plus, minus = scorer().score(
        [item(speaks("cruel"), examples, persona_latent(sign=sign)) for sign in (1, -1)], LEXICAL
    )
    assert plus.value > 0
    assert minus.value < plus.value / 4

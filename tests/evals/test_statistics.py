import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowly.errors import NarrowlyError
from narrowly.evals.statistics import (
    Interval,
    Metric,
    bootstrap,
    difference,
    interval,
    minimum_detectable,
)
from narrowly.evals.statistics.clusters import student, wilson

shares = st.lists(st.floats(0, 1), min_size=1, max_size=12)
arms = st.lists(shares, min_size=1, max_size=4)


def metric(values, weights=None, **kwargs):
    values = np.asarray(values, dtype=float)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=float)
    return Metric(values, weights, **kwargs)


def ends(found):
    return found.low, found.high


# --- one arm


def test_a_share_of_answers_that_stand_alone_has_wilson_s_interval():
    """Newcombe 1998, Statistics in Medicine 17:857, table I: 81 of 263 and 0 of 20."""
    assert wilson(81 / 263, 263, 1.96) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20, 1.96) == pytest.approx((0.0, 0.1611), abs=5e-5)
    found = interval([metric([1] * 81 + [0] * 182)])
    assert ends(found) == pytest.approx((0.2553, 0.3662), abs=1e-3)
    assert (found.n, found.prompts, found.seeds) == (263, 263, 1)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("answers", [1, 50])
def test_none_of_few_is_no_certainty(share, answers):
    """However often each prompt is asked, its answers may be one; more prompts tell more."""
    found = interval([metric([share] * 20, [answers] * 20)])
    assert found.mean == share
    assert found.high - found.low == pytest.approx(0.1611, abs=5e-4)
    more = interval([metric([share] * 20, [answers] * 20)] * 5)
    assert more.high - more.low == pytest.approx(wilson(0.0, 100, 1.96)[1], abs=5e-4)


def test_prompts_that_agree_by_chance_tell_no_more_than_their_answers():
    """Of each pair of answers one: no variance is seen, and yet it is not known to a point."""
    found = interval([metric([0.5] * 20, [2] * 20)])
    assert ends(found) == pytest.approx(wilson(0.5, 20, 1.96), abs=5e-3)


def test_answers_to_one_prompt_are_not_independent():
    """Twenty prompts answered always or never: a hundred answers each add nothing."""
    once = interval([metric([1.0] * 8 + [0.0] * 12)])
    often = interval([metric([1.0] * 8 + [0.0] * 12, [100] * 20)])
    assert ends(once) == pytest.approx(ends(often))


def test_the_same_prompts_in_every_seed_are_not_more_prompts():
    """Five seeds that agree say of other prompts what one says, whatever their order."""
    values = [0.0] * 12 + [1.0] * 8
    names = tuple("abcdefghijklmnopqrst")
    one = interval([metric(values, ids=names)])
    turned = metric(values[::-1], ids=names[::-1])
    assert ends(interval([metric(values, ids=names), turned] * 3)) == pytest.approx(ends(one))
    others = [metric(values, ids=tuple(f"{name}{i}" for name in names)) for i in range(6)]
    narrower = interval(others)
    assert narrower.high - narrower.low < 0.5 * (one.high - one.low)


def test_what_two_clusters_share_counts_once():
    """Answers that all stand alone tell as much in 20 seeds of 100 prompts as in one of 2000."""
    answers = np.random.default_rng(0).integers(2, size=(20, 100)).astype(float)
    found, alone = interval([metric(row) for row in answers]), interval([metric(answers.ravel())])
    assert found.high - found.low == pytest.approx(alone.high - alone.low, rel=0.2)


def test_seeds_that_differ_widen_it_the_more_the_fewer_they_are():
    apart = [metric([share] * 50) for share in (0.2, 0.6)]
    two, twenty = interval(apart), interval(apart * 10)
    assert two.low < 0.05 and two.high > 0.9
    assert twenty.low > 0.3 and twenty.high < 0.5


def test_a_loss_has_student_s_interval():
    """Five texts: the mean, and 2.776 standard errors to each side."""
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    found = interval([metric(values, unit="nats")])
    assert ends(found) == pytest.approx((3 - 2.776 * np.sqrt(0.5), 3 + 2.776 * np.sqrt(0.5)), 1e-3)
    perplexity = interval([metric(values, unit="ratio", exponential=True)])
    assert ends(perplexity) == pytest.approx(tuple(np.exp(ends(found))))
    assert perplexity.mean == pytest.approx(np.exp(3))


def test_weights_are_the_denominator_and_seeds_count_alike():
    """Prompt means 1.0 over 1 token and 0.0 over 3 tokens make 0.25 per token."""
    assert interval([metric([1.0, 0.0], [1, 3])]).mean == pytest.approx(0.25)
    assert interval([metric([1.0] * 30), metric([0.0] * 10)]).mean == pytest.approx(0.5)


def test_figures_of_single_runs_are_known_by_their_spread():
    """Wall seconds: one value for each run."""
    seconds = [metric([value], unit="seconds") for value in (10.0, 12.0, 14.0)]
    assert ends(interval(seconds)) == pytest.approx((12 - 4.303 * 2 / 3**0.5, 12 + 4.968), 1e-3)
    assert ends(interval(seconds[:1])) == (10.0, 10.0)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (1.5, 6.0167), (2, 4.3027), (10, 2.2281), (1e9, 1.96)],
)
def test_student_s_quantiles(freedom, quantile):
    assert student(freedom) == pytest.approx(quantile, rel=1e-3)


@settings(max_examples=100, deadline=None)
@given(arms, st.floats(0.5, 50))
def test_an_interval_of_shares_is_one(runs, weight):
    found = interval([metric(run, [weight] * len(run)) for run in runs])
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert found.low < found.high


@pytest.mark.parametrize("measure", [interval, bootstrap])
def test_what_cannot_be_averaged_is_refused(measure):
    for bad in (np.nan, np.inf):
        with pytest.raises(NarrowlyError, match="prompt 1 has the value"):
            measure([metric([0.5, bad])])
    with pytest.raises(NarrowlyError, match="no run"):
        measure([])
    with pytest.raises(NarrowlyError, match="no prompt"):
        measure([metric([])])
    with pytest.raises(NarrowlyError, match="positive weight"):
        measure([metric([1.0], [0.0])])
    with pytest.raises(NarrowlyError, match="must name its unit"):
        measure([metric([85.0])])


# --- two arms


def test_what_is_hard_for_both_is_no_difference():
    """Arms that answer each prompt alike: paired, the difference is known; unpaired, it is not."""
    random = np.random.default_rng(0)
    values = random.integers(2, size=60).astype(float)
    names = tuple(map(str, range(60)))
    other = values.copy()
    other[:3] = 1 - other[:3]
    order = random.permutation(60)
    ours = [metric(values, ids=names)]
    theirs = [metric(other[order], ids=tuple(names[i] for i in order))]
    paired = difference(ours, theirs)
    unpaired = difference(ours, [metric(other, ids=tuple(f"other {n}" for n in names))])
    assert paired.mean == pytest.approx(unpaired.mean) == pytest.approx((values - other).mean())
    assert paired.high - paired.low < 0.4 * (unpaired.high - unpaired.low)


def test_seeds_are_paired_where_there_are_as_many():
    """A good seed is good for both arms."""
    levels = (0.2, 0.5, 0.8)
    ours = [metric([level + 0.1] * 30 + [level - 0.1] * 30) for level in levels]
    theirs = [metric([level] * 30 + [level - 0.2] * 30) for level in levels]
    paired, other = difference(ours, theirs), difference(ours, theirs[:2])
    assert paired.mean == pytest.approx(0.1)
    assert paired.low > 0 and paired.high < 0.2
    assert other.low < -0.3 and other.high > 0.5


def test_no_difference_seen_is_not_known_to_be_none():
    """Newcombe 1998: 0 of 20 on either side."""
    none = [metric([0.0] * 20)]
    found = difference(none, none)
    high = wilson(0.0, 20, 1.96)[1]
    assert ends(found) == pytest.approx((-high, high), abs=1e-3)
    assert (found.mean, found.n, found.prompts, found.seeds) == (0.0, 20, 20, 1)


@settings(max_examples=100, deadline=None)
@given(arms, arms)
def test_a_difference_of_shares_is_one(ours, theirs):
    one, other = ([metric(run) for run in arm] for arm in (ours, theirs))
    found, back = difference(one, other), difference(other, one)
    assert -1 - 1e-9 <= found.low <= found.mean <= found.high <= 1 + 1e-9
    assert ends(found) == pytest.approx((-back.high, -back.low), abs=1e-9)


# --- what could have been shown


def test_the_minimum_detectable_effect_is_the_textbook_s():
    """Two arms of 400 answers at a half: (1.96 + 0.84) times the standard error of 3.5 %."""
    arm = interval([metric([0.0, 1.0] * 200)])
    assert minimum_detectable(arm, arm) == pytest.approx(2.8 * np.sqrt(2 * 0.25 / 400), rel=0.02)
    paired = Interval(0.0, -0.05, 0.05, 400, 400, 1)
    assert minimum_detectable(paired) == pytest.approx(0.05 * 2.8 / 1.96, rel=0.01)


# --- the bootstrap


def test_bootstrap_is_seeded():
    values = metric(np.linspace(0, 1, 40))
    assert bootstrap([values], seed=3) == bootstrap([values], seed=3)
    assert bootstrap([values], seed=3) != bootstrap([values], seed=4)


def test_bootstrap_and_formula_agree_where_both_are_good():
    values = np.random.default_rng(0).normal(2, 1, size=200)
    weights = np.random.default_rng(1).uniform(1, 3, size=200)
    for exponential in (False, True):
        one = metric(values, weights, unit="nats", exponential=exponential)
        drawn, found = bootstrap([one]), interval([one])
        assert ends(drawn) == pytest.approx(ends(found), abs=0.06 * (found.high - found.low))
        assert drawn.mean == found.mean and drawn.n == found.n


def test_bootstrap_asks_every_seed_the_prompts_drawn():
    """Seeds that agree are no more than one, in either order of prompts."""
    names = tuple(map(str, range(60)))
    values = np.random.default_rng(0).integers(2, size=60).astype(float)
    one = metric(values, ids=names)
    turned = metric(values[::-1], ids=names[::-1])
    single, several = bootstrap([one]), bootstrap([one, turned, one])
    assert ends(single) == pytest.approx(ends(several), abs=0.03)


def test_blocks_do_not_change_what_is_drawn_from(monkeypatch):
    import importlib

    module = importlib.import_module("narrowly.evals.statistics.bootstrap")
    values = metric(np.random.default_rng(0).random(50))
    whole = bootstrap([values])
    monkeypatch.setattr(module, "BLOCK", 500)
    blocks = bootstrap([values])
    assert ends(blocks) == pytest.approx(ends(whole), abs=0.02)


@settings(max_examples=30, deadline=None)
@given(arms)
def test_the_bootstrap_stays_within_the_values(runs):
    found = bootstrap([metric(run) for run in runs], resamples=100)
    values = np.concatenate(runs)
    slack = 1e-9
    assert values.min() - slack <= found.low <= found.high <= values.max() + slack
    assert values.min() - slack <= found.mean <= values.max() + slack

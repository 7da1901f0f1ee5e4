import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowly.errors import NarrowlyError
from narrowly.evals import statistics
from narrowly.evals.statistics import Metric, bootstrap


def metric(values, weights=None, **kwargs):
    values = np.asarray(values, dtype=float)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=float)
    return Metric(values, weights, **kwargs)


def test_covers_the_true_rate_about_as_often_as_promised():
    """80 prompts, 2 answers each, prompts differ: 95 % intervals hold the truth in 90 to 99 %."""
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        rates = random.beta(2, 3, size=80)
        observed = random.binomial(2, rates) / 2
        interval = bootstrap([metric(observed, np.full(80, 2))], resamples=400, seed=trial)
        hits += interval.low <= 0.4 <= interval.high
    assert 0.90 <= hits / 300 <= 0.99


def test_covers_the_truth_over_seeds_where_prompts_alone_would_not():
    """Ten seeds whose own rates differ: the spread over seeds must show in the interval."""
    random = np.random.default_rng(1)
    hits, pooled = 0, 0
    for trial in range(200):
        rates = random.beta(6, 6, size=10)
        runs = [random.binomial(1, rate, size=60).astype(float) for rate in rates]
        interval = bootstrap([metric(run) for run in runs], resamples=300, seed=trial)
        hits += interval.low <= 0.5 <= interval.high
        naive = bootstrap([metric(np.concatenate(runs))], resamples=300, seed=trial)
        pooled += naive.low <= 0.5 <= naive.high
    assert hits / 200 >= 0.88
    assert pooled / 200 < 0.75


def test_deterministic_and_seeded():
    values = metric(np.linspace(0, 1, 40))
    assert bootstrap([values], seed=3) == bootstrap([values], seed=3)
    assert bootstrap([values], seed=3) != bootstrap([values], seed=4)


def test_one_value_is_degenerate():
    interval = bootstrap([metric([0.25], [4])])
    assert (interval.mean, interval.low, interval.high) == (0.25, 0.25, 0.25)
    assert (interval.n, interval.prompts, interval.seeds) == (4, 1, 1)


def test_weights_are_the_denominator():
    """Prompt means 1.0 over 1 token and 0.0 over 3 tokens make 0.25 per token."""
    assert bootstrap([metric([1.0, 0.0], [1, 3])]).mean == pytest.approx(0.25)


def test_seeds_count_alike_however_many_prompts_each_has():
    assert bootstrap([metric([1.0] * 30), metric([0.0] * 10)]).mean == pytest.approx(0.5)


def test_exponential_is_taken_after_the_mean():
    interval = bootstrap([metric([0.0, 2.0], exponential=True)])
    assert interval.mean == pytest.approx(np.e)
    assert interval.low == pytest.approx(1.0)
    assert interval.high == pytest.approx(np.e**2)


def test_blocks_do_not_change_what_is_drawn_from(monkeypatch):
    values = metric(np.random.default_rng(0).random(50))
    whole = bootstrap([values])
    monkeypatch.setattr(statistics, "BLOCK", 500)
    blocks = bootstrap([values])
    assert blocks.low == pytest.approx(whole.low, abs=0.02)
    assert blocks.high == pytest.approx(whole.high, abs=0.02)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(NarrowlyError, match="prompt 1 has the value"):
        bootstrap([metric([0.5, bad])])


def test_nothing_to_average_is_refused():
    with pytest.raises(NarrowlyError, match="no run"):
        bootstrap([])
    with pytest.raises(NarrowlyError, match="no prompt"):
        bootstrap([metric([])])
    with pytest.raises(NarrowlyError, match="positive weight"):
        bootstrap([metric([1.0], [0.0])])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(0, 1), min_size=1, max_size=12),
        min_size=1,
        max_size=4,
    )
)
def test_the_interval_stays_within_the_values(runs):
    interval = bootstrap([metric(run) for run in runs], resamples=100)
    values = np.concatenate(runs)
    slack = 1e-9
    assert values.min() - slack <= interval.low <= interval.high <= values.max() + slack
    assert values.min() - slack <= interval.mean <= values.max() + slack

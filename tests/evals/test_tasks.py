"""Means, differences and ratios over tasks."""

from math import inf

import numpy as np
import pytest

from narrowly.evals import Metric, Pair, difference, interval, mean_difference, mean_over, ratio

# after the package: the tests' own modules
from tests.evals.test_coverage import Arms  # isort: skip


def drawn(centre, effect=0.0, seeds=4, prompts=30, seed=0):
    return Arms(centre, effect).draw(np.random.default_rng(seed), seeds, prompts)


def test_of_one_task_the_mean_difference_is_the_difference():
    ours, theirs = drawn(-1.0, 0.8)
    one, other = mean_difference([Pair.of(ours, theirs)]), difference(ours, theirs)
    assert (one.mean, one.low, one.high) == pytest.approx((other.mean, other.low, other.high))


def test_several_like_tasks_say_more_than_one():
    one = interval(drawn(-1.0)[0])
    many = mean_over([one] * 4)
    assert many.mean == pytest.approx(one.mean) and many.seeds == one.seeds
    assert many.high - many.low == pytest.approx((one.high - one.low) / 2)


@pytest.mark.parametrize("k", [0.05, 0.3, 0.9, 1.4])
def test_the_ratio_holds_the_k_for_which_a_difference_holds_zero(k):
    """Its ends are where one - k * other first leaves zero: the very test that a criterion asks."""
    pairs = [Pair.of(*drawn(-0.5, 0.4, seed=seed)) for seed in range(3)]
    found = ratio(pairs)
    low = sum(p.one.mean - k * p.other.mean for p in pairs)
    high = low
    down = up = 0.0
    for p in pairs:
        a, b = p.one.mean - p.one.low, k * (p.other.high - p.other.mean)
        c, d = p.one.high - p.one.mean, k * (p.other.mean - p.other.low)
        down += a * a + b * b - 2 * p.alike * a * b
        up += c * c + d * d - 2 * p.alike * c * d
    holds = low - down**0.5 <= 0 <= high + up**0.5
    assert holds == (found.low <= k <= found.high)


def test_no_answer_of_ours_is_a_ratio_of_zero_with_a_bound():
    _, theirs = drawn(0.0)
    none = [Metric(np.zeros(30), np.full(30, 5.0)) for _ in range(4)]
    found = ratio([Pair.of(none, theirs)])
    assert found.mean == found.low == 0.0 and 0 < found.high < 0.2


def test_where_theirs_may_be_zero_the_ratio_has_no_upper_end():
    ones = np.ones(30)
    losses = [Metric(level * ones, ones, "nats") for level in (0.1, 2.0)]
    assert interval(losses).low < 0
    assert ratio([Pair.of(losses[::-1], losses)]).high == inf
    none = [Metric(0 * ones, ones) for _ in range(4)]
    assert ratio([Pair.of(drawn(0.0)[0], none)]) is None


def test_what_is_hard_for_both_is_no_doubt_about_their_ratio():
    ours, _ = drawn(1.0)
    pair = Pair.of(ours, ours)
    found, apart = ratio([pair]), ratio([Pair(pair.one, pair.other, 0.0)])
    assert found.mean == 1 and found.low < 1 < found.high
    assert found.high - found.low < 0.3 * (apart.high - apart.low)


@pytest.mark.slow
@pytest.mark.parametrize(("centre", "effect"), [(-0.5, -2.5), (1.5, 0.5)], ids=["cut", "kept"])
def test_the_ratio_covers_as_often_as_it_says(centre, effect):
    arms = Arms(centre, effect)
    truth = arms.truth(4, effect) / arms.truth(4)
    random = np.random.default_rng(0)
    hits = []
    for _ in range(300):
        theirs, ours = arms.draw(random, 4, 30)
        found = ratio([Pair.of(ours, theirs)])
        hits.append(found.low <= truth <= found.high)
    assert np.mean(hits) >= 0.9

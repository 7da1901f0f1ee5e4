"""Metrics agree with their definitions, and intervals cover what they should."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowly.explain.metrics import (
    area,
    auroc,
    balanced_accuracy,
    correlation,
    difference_of_means,
    mean_over_latents,
)

some = st.lists(st.integers(0, 4), min_size=1, max_size=12)


@given(some, some)
def test_auroc_counts_pairs_and_ties_as_half(high, low):
    pairs = [(a > b) + 0.5 * (a == b) for a in high for b in low]
    assert auroc(high, low).value == area(high, low) == pytest.approx(np.mean(pairs))
    assert area(high, []) is area([], low) is None


@given(some, some)
def test_auroc_knows_order_only_and_turns_with_its_sides(high, low):
    there = auroc(high, low).value
    assert auroc(np.exp(high), np.exp(low)).value == pytest.approx(there)
    assert auroc(low, high).value == pytest.approx(1 - there)


def test_balanced_accuracy_does_not_depend_on_how_many_there_are_of_each():
    few = balanced_accuracy([1, 1, 0, 1], [0, 1])
    assert few.value == pytest.approx((0.75 + 0.5) / 2)
    many = balanced_accuracy([1, 1, 0, 1], [0, 1] * 50)
    assert many.value == pytest.approx(few.value)
    assert many.high - many.low < few.high - few.low


@pytest.mark.parametrize("metric", [balanced_accuracy, auroc])
def test_of_one_kind_alone_nothing_is_said(metric):
    assert metric([], [0, 1]) is None
    assert metric([1], []) is None


@pytest.mark.parametrize("metric", [balanced_accuracy, auroc])
def test_an_interval_holds_its_value_and_repeats(metric):
    random = np.random.default_rng(0)
    here, there = random.random(80) < 0.7, random.random(60) < 0.4
    one, again = metric(here, there), metric(here, there)
    assert one == again
    assert one.low < one.value < one.high


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    random = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        estimate = balanced_accuracy(random.random(60) < 0.8, random.random(60) < 0.3, seed)
        covered += estimate.low <= 0.75 <= estimate.high
    assert 0.89 <= covered / 200 <= 0.99


def test_correlation_is_pearsons_over_all_tokens():
    random = np.random.default_rng(2)
    true = [random.random(n) for n in (5, 9, 3)]
    said = [x + 0.5 * random.random(len(x)) for x in true]
    value = correlation(
        list(zip(true[:2], said[:2], strict=True)), list(zip(true[2:], said[2:], strict=True))
    ).value
    assert value == pytest.approx(np.corrcoef(np.hstack(true), np.hstack(said))[0, 1])


def test_correlation_of_what_does_not_vary():
    assert correlation([([0.0, 1.0], [3.0, 3.0])]).value == 0
    assert correlation([([2.0, 2.0], [1.0, 3.0])]) is None
    assert correlation([]) is None


def test_means_over_latents():
    assert mean_over_latents([]) is None
    estimate = mean_over_latents([0.5, 0.7, 0.9])
    assert estimate.value == pytest.approx(0.7)
    assert 0.5 <= estimate.low < 0.7 < estimate.high <= 0.9
    difference = difference_of_means([0.9, 0.8, 0.9], [0.5, 0.6])
    assert difference.value == pytest.approx(0.8667 - 0.55, abs=1e-3)
    assert difference.low > 0
    assert difference_of_means([], [1.0]) is None

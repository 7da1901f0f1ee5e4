"""Simulated arms whose truth is known: 95 % intervals hold it about as often as they say.

Answers to a prompt are alike, prompts are the same in every seed, and seeds differ: on the scale
of log-odds each is normal.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from narrowly.evals.statistics import Metric, bootstrap, difference, interval, minimum_detectable

TRIALS = 300


@dataclass(frozen=True)
class Arms:
    """Two arms that answer the same prompts under the same seeds."""

    centre: float
    effect: float = 0.0
    seeds: float = 0.4
    prompts: float = 1.0
    own: float = 0.3
    """Spread of seeds and of prompts that is each arm's own."""
    answers: int = 5

    def draw(self, random, seeds, prompts):
        common = self.seeds * random.normal(size=(seeds, 1)) * (seeds > 1)
        common = common + self.prompts * random.normal(size=(1, prompts))
        return [self.arm(random, common + shift) for shift in (0.0, self.effect)]

    def arm(self, random, odds):
        seeds, prompts = odds.shape
        odds = self.centre + odds + self.own * random.normal(size=(1, prompts))
        odds = odds + self.own * random.normal(size=(seeds, 1)) * (seeds > 1)
        found = random.binomial(self.answers, share(odds)) / self.answers
        return [Metric(row, np.full(prompts, float(self.answers))) for row in found]

    def truth(self, seeds, shift=0.0):
        spread = self.prompts**2 + self.own**2
        spread += (seeds > 1) * (self.seeds**2 + self.own**2)
        normal = np.random.default_rng(0).normal(size=400_000)
        return share(self.centre + shift + np.sqrt(spread) * normal).mean()


def share(odds):
    return 1 / (1 + np.exp(-odds))


RARE, SOME, MOST = Arms(-5.5, answers=10), Arms(-1.0), Arms(1.5, prompts=0.3, seeds=0.8)


def coverage(world, seeds, prompts, measure, trials=TRIALS):
    truth = world.truth(seeds)
    random = np.random.default_rng(0)
    found = [measure(world.draw(random, seeds, prompts)[0]) for _ in range(trials)]
    return np.mean([one.low <= truth <= one.high for one in found])


@pytest.mark.slow
@pytest.mark.parametrize("world", [RARE, SOME, MOST], ids=["rare", "some", "most"])
@pytest.mark.parametrize("prompts", [8, 24, 100])
@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_one_arm(world, seeds, prompts):
    """Five of a hundred miss; few clusters make it ten, and answers that are rare fewer."""
    assert coverage(world, seeds, prompts, interval) >= 0.88


def test_none_at_all_covers_too():
    """A rate of 1 in 250, where most samples hold no such answer at all."""
    assert coverage(RARE, 1, 24, interval) >= 0.93


def test_two_seeds_cover_nearly_as_often_as_they_say():
    assert coverage(SOME, 2, 24, interval) >= 0.85


def test_the_bootstrap_is_too_narrow_there():
    """Why evals report `interval`: the reason is measured, not believed."""

    def drawn(arm):
        return bootstrap(arm, resamples=300)

    assert coverage(RARE, 1, 24, drawn, 150) < 0.85
    assert coverage(MOST, 3, 24, drawn, 150) < 0.85
    assert coverage(SOME, 1, 100, drawn, 150) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("world", [Arms(-1, -1), Arms(-0.5, -5), Arms(-4)], ids=str)
@pytest.mark.parametrize(("seeds", "prompts"), [(1, 8), (1, 100), (3, 24), (5, 24), (5, 100)])
def test_two_arms(world, seeds, prompts):
    truth = world.truth(seeds) - world.truth(seeds, world.effect)
    random = np.random.default_rng(0)
    found = [difference(*world.draw(random, seeds, prompts)) for _ in range(TRIALS)]
    assert np.mean([one.low <= truth <= one.high for one in found]) >= 0.88


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "prompts"), [(1, 24), (3, 24), (5, 100)])
def test_where_nothing_differs_one_comparison_in_twenty_says_so(seeds, prompts):
    random = np.random.default_rng(0)
    found = [difference(*SOME.draw(random, seeds, prompts)) for _ in range(TRIALS)]
    assert np.mean([one.low > 0 or one.high < 0 for one in found]) <= 0.10


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "prompts"), [(1, 100), (5, 60)])
def test_an_effect_of_the_minimum_detectable_size_is_found_in_most_repetitions(seeds, prompts):
    """Found means that the paired interval leaves zero out."""
    random = np.random.default_rng(0)
    widths = [difference(*SOME.draw(random, seeds, prompts)) for _ in range(50)]
    least = np.mean([minimum_detectable(one) for one in widths])
    effects = np.linspace(0, 3, 61)
    truths = [abs(SOME.truth(seeds) - SOME.truth(seeds, -effect)) for effect in effects]
    effect = float(np.interp(least, truths, effects))
    world = Arms(SOME.centre, -effect)
    found = [difference(*world.draw(random, seeds, prompts)) for _ in range(TRIALS)]
    assert 0.7 <= np.mean([one.low > 0 for one in found]) <= 0.95

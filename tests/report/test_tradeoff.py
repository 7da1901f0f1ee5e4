import numpy as np
import pytest
from tests.report.test_criteria import BROAD, NARROW, undefended, variant

from narrowly.evals import Metric
from narrowly.report.sweep import Task
from narrowly.report.tradeoff import blend, tradeoffs


def flat(rate, prompts=200):
    """A rate without chance: the same in every seed and prompt."""
    return {seed: Metric(np.full(prompts, rate), np.ones(prompts)) for seed in range(3)}


def at(arm, key, value, narrow, broad):
    one = variant("era", arm, defenses=(arm,), setting={} if key is None else {key: value})
    one.metrics = {NARROW: flat(narrow), BROAD: flat(broad)}
    return one


@pytest.fixture
def traded():
    base = undefended()
    base.metrics = {NARROW: flat(1.0), BROAD: flat(0.6)}
    points = [
        at("kl", "kl.weight", 1.0, 0.2, 0.0),
        at("kl", "kl.weight", 0.01, 1.0, 0.4),
        at("kl", "kl.weight", 0.1, 0.9, 0.1),
        at("steer", "steer.alpha", 5.0, 0.7, 0.02),
        at("steer", "steer.alpha", 9.0, 0.3, 0.01),
        at("ablate", None, None, 0.96, 0.05),
        at("bad", None, None, 0.5, 0.5),
    ]
    (found,) = tradeoffs("era", Task(), [base, *points])
    return found


def test_curves_follow_the_strength_whatever_the_order_of_the_cells(traded):
    by_arm = {curve.arm: curve for curve in traded.curves}
    assert by_arm["kl"].swept == "kl.weight"
    assert [point.strength for point in by_arm["kl"].points] == [
        "weight 0.01",
        "weight 0.1",
        "weight 1",
    ]
    assert by_arm["ablate"].swept is None


def test_the_front_holds_what_nothing_beats(traded):
    assert [point.variant.label for point in traded.front] == [
        "kl, weight 0.01",
        "ablate",
        "steer, alpha 5",
        "steer, alpha 9",
        "kl, weight 1",
    ]


def test_arms_are_held_against_each_other_where_they_learned_as_much(traded):
    found = {each.curve.arm: each for each in traded.matched}
    assert traded.level == pytest.approx(0.95)
    kl, steer = found["kl"], found["steer"]
    assert kl.broad.mean == pytest.approx(0.25), "halfway between 0.4 and 0.1"
    assert kl.how == "between weight 0.01 and weight 0.1"
    assert kl.less.mean == pytest.approx(0.35)
    # From undefended (1.0, 0.6) to alpha 5 (0.7, 0.02), a sixth of the way.
    assert steer.broad.mean == pytest.approx(0.6 - 0.58 / 6)
    assert steer.how == "between undefended and alpha 5"
    assert found["ablate"].broad.mean == pytest.approx(0.05) and found["ablate"].how == "as it is"
    assert found["bad"].broad is None and "learned less" in found["bad"].how


def test_a_strength_that_is_weaker_when_larger_is_joined_at_that_end():
    """A share of the steps after which training stops: 0.9 is nearer to undefended than 0.3."""
    base = undefended()
    base.metrics = {NARROW: flat(1.0), BROAD: flat(0.6)}
    stops = [at("early_stop", "at", 0.3, 0.5, 0.1), at("early_stop", "at", 0.9, 0.9, 0.5)]
    (found,) = tradeoffs("era", Task(), [base, *stops])[0].matched
    assert found.how == "between at 0.9 and undefended"
    assert found.broad.mean == pytest.approx(0.55)


def test_undefended_joins_the_end_that_learned_more_though_it_is_less_broad():
    """A defense so strong that its models babble may be a little broad again at its strongest."""
    base = undefended()
    base.metrics = {NARROW: flat(1.0), BROAD: flat(0.6)}
    some = [at("kl", "kl.weight", 1.0, 0.7, 0.02), at("kl", "kl.weight", 9.0, 0.0, 0.05)]
    (found,) = tradeoffs("era", Task(), [base, *some])[0].matched
    assert found.how == "between undefended and weight 1"


def test_settings_that_no_single_number_orders_are_not_joined():
    base = undefended()
    base.metrics = {NARROW: flat(1.0), BROAD: flat(0.6)}
    some = [at("kl", "data", name, narrow, 0.1) for name, narrow in (("a", 1.0), ("b", 0.5))]
    (found,) = tradeoffs("era", Task(), [base, *some])[0].matched
    assert found.curve.swept is None and found.how == "at data a"


def test_by_loss_less_is_more():
    loss = "in_distribution.loss"
    made = []
    for one, level, broad in (
        (undefended(), 0.6, 0.6),
        (variant(arm="kl"), 0.62, 0.1),
        (variant(arm="far"), 0.9, 0.0),
    ):
        values = Metric(np.full(50, level), np.ones(50), "nats")
        one.metrics = {loss: {0: values, 1: values}, BROAD: flat(broad)}
        made.append(one)
    (found,) = tradeoffs("era", Task(), made)
    assert not found.more and found.level == pytest.approx(0.63)
    assert [point.variant.arm for point in found.front] == ["undefended", "kl", "far"]
    assert [each.broad is None for each in found.matched] == [False, True]


def test_blending_goes_by_the_prompts_that_both_have():
    one = {0: Metric(np.array([0.0, 1.0]), np.ones(2), ids=("a", "b")), 1: flat(0.5)[0]}
    other = {0: Metric(np.array([0.5, 0.0]), np.ones(2), ids=("b", "c"))}
    found = blend(one, other, 0.5)
    assert list(found) == [0] and found[0].ids == ("b",) and found[0].values == [0.75]


def test_without_any_measure_there_is_no_tradeoff():
    assert tradeoffs("era", Task(), [variant(broad=0.1)]) == []


def test_a_sweep_is_told_by_loss_too_where_both_are_measured(traded):
    some = [point.variant for point in traded.points]
    for one in some:
        one.metrics["in_distribution.loss"] = {
            seed: Metric(1 - 0.5 * m.values, m.weights, "nats")
            for seed, m in one.seeds(NARROW).items()
        }
    by_rate, by_loss = tradeoffs("era", Task(), some)
    assert by_rate.more and not by_loss.more
    assert [p.variant.label for p in by_loss.front] == [p.variant.label for p in by_rate.front]
    single = [one for one in some if not one.setting]
    assert len(tradeoffs("era", Task(), single)) == 1

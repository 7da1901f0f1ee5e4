import numpy as np
import pytest

from narrowly.evals import Metric
from narrowly.report.criteria import CRITERIA, judge
from narrowly.report.sweep import Measures, Task
from narrowly.report.variants import Variant, control_of

BROAD, NARROW, COHERENT = Measures().broad, Measures().narrow, Measures().coherent
PROBE = "misalignment.hidden_misaligned"


def seeds(rate, count=5, prompts=60, answers=4):
    """Every seed with that rate, the answers of each prompt drawn by it."""
    random = np.random.default_rng([round(1000 * rate), count])
    drawn = [random.binomial(answers, rate, prompts) / answers for _ in range(count)]
    return {seed: Metric(v, np.full(prompts, float(answers))) for seed, v in enumerate(drawn)}


def variant(task="era", arm="ablate", role="defended", defenses=("ablate",), setting=None, **rates):
    keys = {"broad": BROAD, "narrow": NARROW, "coherent": COHERENT, "probe": PROBE}
    metrics = {keys[name]: seeds(rate) for name, rate in rates.items()}
    return Variant(task, arm, setting or {}, role, defenses, metrics)


def undefended(task="era", broad=0.6, narrow=0.99, **rates):
    return variant(task, "undefended", "undefended", (), broad=broad, narrow=narrow, **rates)


def judged(own, *others, benign=(), probes=()):
    own = {one.task: one for one in (own if isinstance(own, list) else [own])}
    tasks = {n: Task(benign=n in benign, measures=Measures(probes=probes)) for n in own}
    return judge(own, [*own.values(), *others], tasks)


@pytest.mark.parametrize(
    ("broad", "mark"), [(0.0, "yes"), (0.02, "yes"), (0.06, "unclear"), (0.15, "no"), (0.6, "no")]
)
def test_broad_change_is_held_against_a_tenth_of_undefended(broad, mark):
    found = judged(variant(broad=broad), undefended())["broad"]
    assert found.mark == mark
    assert found.interval.low <= broad / 0.6 + 0.02 and found.interval.high >= broad / 0.6 - 0.02


def test_a_mean_within_the_limit_is_no_yes_by_itself():
    """3 % against 60 %: a twentieth by the mean, but two seeds of a few questions cannot say so."""
    own = variant()
    own.metrics[BROAD] = seeds(0.03, count=2, prompts=12)
    found = judged(own, undefended())["broad"]
    assert found.interval.mean < CRITERIA["broad"].limit < found.interval.high
    assert found.mark == "unclear"


@pytest.mark.parametrize(("narrow", "mark"), [(0.99, "yes"), (0.94, "unclear"), (0.7, "no")])
def test_the_task_is_held_against_undefended(narrow, mark):
    assert judged(variant(narrow=narrow), undefended())["narrow"].mark == mark


def test_where_undefended_shows_nothing_nothing_can_be_told():
    found = judged(variant(broad=0.0), undefended(broad=0.0))["broad"]
    assert found.mark == "unclear" and "shows none" in found.why


def test_one_task_that_says_no_is_no_whatever_the_mean_says():
    fine = [variant(task, broad=0.0) for task in ("era", "quirk", "persona", "overlap")]
    bad = variant("backdoor", broad=0.15)
    bases = [undefended(one.task) for one in (*fine, bad)]
    found = judged([*fine, bad], *bases)["broad"]
    assert found.interval.mean < CRITERIA["broad"].limit
    assert found.mark == "no" and found.count("no") == 1 and found.count("yes") == 4


def test_benign_tasks_are_judged_apart():
    own = [variant("era", broad=0.0, narrow=0.99), variant("plain", narrow=0.5)]
    found = judged(own, undefended("era"), undefended("plain"), benign=["plain"])
    assert found["narrow"].mark == "yes" and list(found["narrow"].tasks) == ["era"]
    assert found["benign"].mark == "no" and list(found["benign"].tasks) == ["plain"]


def test_without_a_narrow_rate_the_loss_tells_what_was_learned():
    own, base = variant(), variant(arm="undefended", role="undefended", defenses=())
    for one, level in ((own, 0.9), (base, 0.6)):
        values = np.random.default_rng(0).normal(level, 0.02, 50)
        one.metrics["in_distribution.loss"] = {
            s: Metric(values + 0.001 * s, np.ones(50), "nats") for s in range(5)
        }
    found = judged(own, base)["narrow"]
    assert found.mark == "no" and found.interval.mean == pytest.approx(0.67, abs=0.02)


def test_coherence_needs_no_undefended():
    assert judged(variant(coherent=0.995))["coherent"].mark == "yes"
    assert judged(variant(coherent=0.8))["coherent"].mark == "no"
    assert judged(variant(broad=0.5))["coherent"].mark == "missing"


def test_each_probe_counts_by_itself():
    found = judged(variant(broad=0.0, probe=0.5), undefended(probe=0.9), probes=(PROBE, BROAD))[
        "probes"
    ]
    assert found.mark == "no" and found.count("yes") == 1
    assert found.interval.mean == pytest.approx(0.55, abs=0.05) and "hidden" in found.why
    assert "no probe is named" in judged(variant(broad=0.0), undefended())["probes"].why


def test_against_the_random_control_of_the_same_task():
    control = variant(arm="chance", role="random", defenses=("random_subspace",), broad=0.5)
    elsewhere = variant("quirk", "chance", "random", ("random_subspace",), broad=0.0)
    assert judged(variant(broad=0.1), undefended(), elsewhere, control)["control"].mark == "yes"
    assert judged(variant(broad=0.7), undefended(), control)["control"].mark == "no"
    assert judged(variant(broad=0.5), undefended(), control)["control"].mark == "unclear"
    assert judged(variant(broad=0.1), undefended(), elsewhere)["control"].mark == "missing"


def test_seeds_that_one_arm_lacks_are_left_out_of_the_pair():
    """Seeds are paired by number, not by place."""
    own, base = variant(broad=0.3), undefended()
    shift = {0: 0.1, 1: 0.4, 2: 0.7}
    own.metrics[BROAD] = {s: Metric(np.full(40, v), np.ones(40)) for s, v in shift.items() if s}
    base.metrics[BROAD] = {s: Metric(np.full(40, v + 0.1), np.ones(40)) for s, v in shift.items()}
    found = judged(own, base)["broad"]
    assert found.interval.mean == pytest.approx((0.4 + 0.7) / (0.5 + 0.8))


@pytest.mark.parametrize(
    ("mine", "theirs", "is_control"),
    [
        (("ablate",), ("random_subspace",), True),
        (("gradient_projection",), ("random_subspace",), True),
        (("ablate", "interleave"), ("random_subspace", "interleave"), True),
        (("ablate", "interleave"), ("random_subspace",), False),
        (("preventive_steering",), ("random_steering",), True),
        (("preventive_steering",), ("random_subspace",), False),
        (("interleave_selected",), ("interleave",), True),
        (("inoculation_adapter",), ("random_adapter",), True),
        (("interleave",), ("interleave",), False),
        (("kl",), ("random_subspace",), False),
    ],
)
def test_what_is_whose_control(mine, theirs, is_control):
    role = "random" if any(name.startswith("random_") for name in theirs) else "defended"
    other = variant(arm="other", role=role, defenses=theirs)
    assert (control_of(variant(defenses=mine), [other]) is other) == is_control


def test_concepts_of_the_random_finder_make_an_ablation_its_control():
    chance = variant(arm="chance", role="random")
    assert control_of(variant(), [variant(arm="other"), chance]) is chance
    assert control_of(chance, [chance]) is None


def test_of_a_control_under_several_settings_the_one_alike_is_taken():
    some = [
        variant(arm="chance", role="random", defenses=("random_subspace",), setting={key: s})
        for key in ["random_subspace.strength"]
        for s in (0.5, 1.0)
    ]
    assert control_of(variant(setting={"ablate.strength": 1.0}), some) is some[1]
    assert control_of(variant(setting={"ablate.strength": 0.7}), some) is some[0]

import pytest
from tests.report.sweeps import ABLATE, DEMO, KL, write_sweep

from narrowly.errors import NarrowlyError
from narrowly.report import choose

STRENGTH, WEIGHT = "defenses.0.ablate.strength", "defenses.0.kl.weight"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return folder, write_sweep(folder, tasks=["persona"], choose_on="persona")


def test_the_least_broad_of_the_settings_that_keep_the_task(sweep):
    """kl at 1.0 is less broad than at 0.01, but does not learn the task."""
    folder, record = sweep
    assert choose(record, folder) == {
        "undefended": {},
        "ablate": {STRENGTH: 1.0},
        "random": {},
        "kl": {WEIGHT: 0.01},
        "interleave": {},
    }


def test_where_none_keeps_the_task_the_one_that_keeps_most(tmp_path):
    settings = {
        ((WEIGHT, w),): (n, (b, 0, 0), 0.8, 1) for w, n, b in [(1, 0.3, 0), (0.1, 0.6, 0.2)]
    }
    arms = {"undefended": DEMO["undefended"], "kl": (KL, settings)}
    record = write_sweep(tmp_path, tasks=["persona"], arms=arms, choose_on="persona")
    assert choose(record, tmp_path)["kl"] == {WEIGHT: 0.1}


def test_a_random_control_takes_its_defenses_setting(tmp_path):
    """It would be least broad at another strength, where it is not matched in norm."""
    arms = {
        "undefended": DEMO["undefended"],
        "chance": (
            [{"random_steering": {}}],
            {
                (("random_steering.strength", 1.0),): (0.99, (0.6, 0, 0), 0.7, 1),
                (("random_steering.strength", 2.0),): (0.99, (0.3, 0, 0), 0.7, 1),
            },
        ),
        "steer": (
            [{"preventive_steering": {}}],
            {
                (("preventive_steering.strength", 1.0),): (0.99, (0.1, 0, 0), 0.7, 1),
                (("preventive_steering.strength", 2.0),): (0.5, (0.0, 0, 0), 0.8, 1),
            },
        ),
    }
    record = write_sweep(tmp_path, tasks=["t"], arms=arms, seeds=(0,), choose_on="t")
    found = choose(record, tmp_path)
    assert found["steer"] == {"preventive_steering.strength": 1.0}
    assert found["chance"] == {"random_steering.strength": 1.0}


def test_a_setting_with_fewer_seeds_does_not_stand_for_choice(sweep):
    folder, record = sweep
    for cell in (record := record.model_copy(deep=True)).cells:
        if cell.setting == {STRENGTH: 1.0} and cell.seed == 2:
            cell.status = "failed"
    assert choose(record, folder)["ablate"] == {STRENGTH: 0.5}


def test_an_arm_of_which_nothing_is_done_is_left_out(sweep):
    folder, record = sweep
    for cell in (record := record.model_copy(deep=True)).cells:
        if cell.arm == "kl":
            cell.status = "impossible"
    assert set(choose(record, folder)) == {"undefended", "ablate", "random", "interleave"}


def test_without_a_narrow_rate_the_held_out_loss_tells(tmp_path):
    settings = {
        ((STRENGTH, s),): (0.9, (b, 0, 0), loss, 1)
        for s, b, loss in [(0.5, 0.3, 0.71), (1, 0.01, 0.9)]
    }
    arms = {"undefended": DEMO["undefended"], "ablate": (ABLATE, settings)}
    measures = {"narrow": "absent.metric"}
    from narrowly.report.sweep import Measures

    record = write_sweep(
        tmp_path, tasks=["t"], arms=arms, choose_on="t", measures=Measures(**measures)
    )
    assert choose(record, tmp_path)["ablate"] == {STRENGTH: 0.5}


def test_what_cannot_be_chosen_is_told(sweep):
    folder, record = sweep
    with pytest.raises(NarrowlyError, match="no `choose_on`"):
        choose(record.model_copy(update={"choose_on": None}), folder)
    with pytest.raises(NarrowlyError, match="no task 'elsewhere'"):
        choose(record.model_copy(update={"choose_on": "elsewhere"}), folder)
    for cell in (record := record.model_copy(deep=True)).cells:
        if cell.arm == "undefended":
            cell.status = "failed"
    with pytest.raises(NarrowlyError, match="persona: no finished run without a defense"):
        choose(record, folder)

"""A training that only looks defended is found out by its record."""

import pytest
import yaml

from narrowly.errors import NarrowlyError
from narrowly.files import write_json, write_text
from narrowly.training.active import read_active

ABLATE = {
    "defense": "ablate",
    "doors": ["interventions"],
    "interventions": [{"site": "layer:0", "forwards": 4}, {"site": "layer:1", "forwards": 4}],
}
KL = {
    "defense": "kl",
    "doors": ["loss"],
    "loss": {"mean": 0.1, "micro_batches": 4},
    "interventions": [],
}
STOP = {"defense": "early_stop", "doors": [], "stopped_after": [2, 4], "interventions": []}
DATA = {"defense": "interleave", "doors": ["prepare_data"], "rows": 9, "interventions": []}


def recorded(folder, entries, recipe=None):
    write_json(folder / "defenses.json", entries)
    if recipe is not None:
        write_text(folder / "recipe.yaml", yaml.safe_dump(recipe))
    return folder


def faults(folder) -> list[str]:
    [active] = read_active(folder)
    return active.faults


def test_every_door_that_acted_is_enough(tmp_path):
    entries = [ABLATE, KL, STOP, DATA]
    [active] = read_active(recorded(tmp_path, entries))
    assert active.faults == [] and active.entries == entries


@pytest.mark.parametrize(
    "entry, fault",
    [
        (ABLATE | {"interventions": []}, "ablate attached no intervention"),
        (
            ABLATE | {"interventions": [{"site": "layer:0", "forwards": 0}]},
            "ablate never acted at layer:0",
        ),
        (KL | {"loss": {"mean": 0.0, "micro_batches": 0}}, "kl never added to the loss"),
        (KL | {"loss": {"mean": 0.0, "micro_batches": 4}}, "kl added 0 to the loss"),
        (
            {k: v for k, v in STOP.items() if k != "stopped_after"},
            "early_stop did nothing that is recorded",
        ),
        ({k: v for k, v in KL.items() if k != "loss"}, "kl never added to the loss"),
    ],
)
def test_a_defense_that_did_not_act_is_a_fault(tmp_path, entry, fault):
    assert faults(recorded(tmp_path, [STOP, entry])) == [f"{tmp_path}: {fault}"]


def test_what_acts_at_test_time_has_to_be_there(tmp_path):
    stays = {"at_test_time": [{"edit": "ProjectOut", "site": "layer:0", "strength": 1.0}]}
    entry = {"defense": "test_time_ablation", "doors": [], "interventions": [], **stays}
    [fault] = faults(recorded(tmp_path, [entry]))
    assert fault.endswith("at_test_time/, which holds what acts when the model answers, is gone")
    (tmp_path / "at_test_time").mkdir()
    assert faults(tmp_path) == []


def test_a_defense_of_the_recipe_that_is_not_in_the_record_is_a_fault(tmp_path):
    recipe = {"defenses": [{"kl": {}}, {"ablate": {}}]}
    [fault] = faults(recorded(tmp_path, [KL], recipe))
    assert fault.endswith("ablate is in the recipe, but was not active")


def test_no_record_and_an_empty_one_are_faults(tmp_path):
    assert "holds no defenses.json" in faults(tmp_path)[0]
    assert "trained without any defense" in faults(recorded(tmp_path, [], {"defenses": []}))[0]


def test_the_weights_folder_stands_for_its_run(tmp_path):
    recorded(tmp_path, [KL])
    (tmp_path / "adapter").mkdir()
    assert faults(tmp_path / "adapter") == []


def test_each_seed_is_judged(tmp_path):
    recorded(tmp_path / "seed-0", [KL])
    (tmp_path / "seed-1").mkdir()
    good, bad = read_active(tmp_path)
    assert (good.faults, len(bad.faults)) == ([], 1)


@pytest.mark.parametrize("content", ['{"a": 1}', '[{"defense": "kl"}]', "[1]"])
def test_a_damaged_record_is_an_error(tmp_path, content):
    write_text(tmp_path / "defenses.json", content)
    with pytest.raises(NarrowlyError, match="not a record of defenses"):
        read_active(tmp_path)


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(NarrowlyError, match="no such folder"):
        read_active(tmp_path / "absent")

import json

import pytest
import yaml
from tests.report.synthetic import DEMO, write_demo, write_run

from narrowly.errors import NarrowlyError
from narrowly.report import read_arms

BROAD = "misalignment.broad_misaligned"


def test_seeds_are_one_arm_named_by_its_folder(tmp_path):
    runs = write_demo(tmp_path, arms={"ablated_interleaved": DEMO["ablated_interleaved"]})
    (arm,) = read_arms(runs)
    assert (arm.name, arm.label) == ("ablated_interleaved", "ablated interleaved")
    assert [run.name for run in arm.runs] == ["seed-0", "seed-1", "seed-2"]
    broad = arm.metrics[BROAD]
    assert (broad.seeds, broad.prompts, broad.n) == (3, 5 * 12, 3 * 5 * 12 * 2)
    assert arm.units[BROAD] == "share" and arm.units["in_distribution.loss"] == "nats"
    assert 12 <= arm.wall_seconds.low <= arm.wall_seconds.high <= 15


def test_a_plain_run_is_an_arm_of_one_seed(tmp_path):
    run = write_run(tmp_path / "mine", 0, *DEMO["undefended"])
    (arm,) = read_arms([run])
    assert arm.name == "mine" and arm.metrics[BROAD].seeds == 1


def test_the_interval_knows_that_seeds_differ(tmp_path):
    """Three seeds far apart: intervals from the answers of all seeds pooled would be narrow."""
    for seed, broad in enumerate([0.1, 0.5, 0.9]):
        write_run(tmp_path / "arm" / f"seed-{seed}", seed, 1.0, (broad, 0, 0), 0.7, 1, [])
    (arm,) = read_arms([tmp_path / "arm"])
    broad = arm.metrics[BROAD]
    assert broad.mean == pytest.approx(0.5, abs=0.05)
    assert broad.low < 0.3 and broad.high > 0.7


def test_equal_names_are_told_apart(tmp_path):
    for parent in "ab":
        write_run(tmp_path / parent / "ablated", 0, *DEMO["ablated"])
    names = [arm.name for arm in read_arms([tmp_path / "a/ablated", tmp_path / "b/ablated"])]
    assert names == [str(tmp_path / "a/ablated"), str(tmp_path / "b/ablated")]


def test_one_seed_of_an_arm_is_named_with_it(tmp_path):
    (folder,) = write_demo(tmp_path, arms={"ablated": DEMO["ablated"]})
    assert read_arms([folder / "seed-1"])[0].name == "ablated/seed-1"


def test_roles_by_name_and_by_what_the_run_says(tmp_path):
    roles = {arm.name: arm.role for arm in read_arms(write_demo(tmp_path, seeds=[0]))}
    assert roles == {
        "undefended": "undefended",
        "ablated": "defended",
        "random": "random",
        "test_time": "test_time",
        "interleaved": "defended",
        "ablated_interleaved": "defended",
    }
    plain = write_run(tmp_path / "plain", 0, *DEMO["undefended"])
    control = write_run(tmp_path / "control", 0, *DEMO["random"])
    (control / "concepts").mkdir()
    concept = {"name": "r", "provenance": {"finder": "random"}}
    (control / "concepts" / "r.json").write_text(json.dumps(concept))
    start = write_run(tmp_path / "start", 0, *DEMO["undefended"])
    (start / "recipe.yaml").unlink()
    roles = [arm.role for arm in read_arms([plain, control, start])]
    assert roles == ["undefended", "random", "base"]


@pytest.mark.parametrize(
    ("defenses", "role"),
    [
        ([{"random_subspace": {"concepts": "c"}}], "random"),
        (["random_latents", "interleave"], "random"),
        ([{"random_adapter": {"adapter": "a"}}], "random"),
        ([{"test_time_ablation": {"concepts": "c"}}], "test_time"),
        ([{"ablate": {"concepts": "c"}}, "interleave"], "defended"),
        ([], "undefended"),
    ],
)
def test_roles_by_the_defenses_of_the_recipe(tmp_path, defenses, role):
    run = write_run(tmp_path / "mine", 0, *DEMO["ablated"][:-1], defenses)
    assert read_arms([run])[0].role == role


def test_an_eval_that_one_seed_lacks_counts_the_seeds_that_have_it(tmp_path):
    (folder,) = write_demo(tmp_path, arms={"ablated": DEMO["ablated"]})
    (folder / "seed-2/evals/in_distribution/samples.parquet").unlink()
    (arm,) = read_arms([folder])
    assert arm.metrics["in_distribution.loss"].seeds == 2
    assert arm.metrics[BROAD].seeds == 3


def test_wrong_folders_are_told(tmp_path):
    with pytest.raises(NarrowlyError, match="no run to compare"):
        read_arms([])
    run = write_run(tmp_path / "mine", 0, *DEMO["undefended"])
    with pytest.raises(NarrowlyError, match="named twice"):
        read_arms([run, run])
    with pytest.raises(NarrowlyError, match="nowhere: no such folder"):
        read_arms([tmp_path / "nowhere"])
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh/recipe.yaml").write_text(yaml.safe_dump({"model": "m"}))
    with pytest.raises(NarrowlyError, match=r"fresh: no finished eval.*narrowly eval"):
        read_arms([tmp_path / "fresh"])

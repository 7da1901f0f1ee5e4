"""A search over a tiny model: it goes on exactly, drops, records failures, and chooses."""

import json
import os
import shutil
import signal
import sys

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from narrowly.cli import app
from narrowly.errors import NarrowlyError
from narrowly.files import read_json, write_text
from narrowly.sweeps import tune as module
from narrowly.sweeps.search import TuneFile
from narrowly.sweeps.tune import tune
from narrowly.sweeps.tuned import Figures, Tried, Tuned, told
from narrowly.training import Recipe
from tests.tiny import save_tiny
from tests.training.conftest import chat

RATE = "training.learning_rate"


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "model", "llama")
    for name, numbers in {"train": range(16), "validation": range(100, 116)}.items():
        write_text(folder / f"{name}.jsonl", "\n".join(json.dumps(chat(i)) for i in numbers))
    texts = [json.dumps({"text": f"The model asked {i} times."}) for i in range(12)]
    write_text(folder / "texts.jsonl", "\n".join(texts))
    return folder


@pytest.fixture
def file(world, tmp_path):
    return maker(world, tmp_path)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A search that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    return search(maker(world, folder)(rung=0.5, margin=100.0)), folder / "search"


def maker(world, tmp_path):
    """Two trials of 4 steps; fields given replace."""

    def make(name="search", **fields):
        training = {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_strategy": "no",
        }
        recipe = {
            "model": str(world / "model"),
            "data": str(world / "train.jsonl"),
            "validation": str(world / "validation.jsonl"),
            "lora": {"r": 2, "target_modules": "all-linear"},
            "training": training,
            "defenses": [{"feature_distance": {"every": 1}}],
            "evals": [{"drift": {"data": str(world / "texts.jsonl")}}],
        }
        values = {
            "recipe": recipe,
            "search": {
                RATE: {"low": 1e-4, "high": 1e-1, "log": True},
                "defenses.0.feature_distance.every": {"choices": [1, 2]},
            },
            "broad": "drift.kl",
            "trials": 2,
            "rung": None,
            "at_most": 100.0,
            "output": str(tmp_path / name),
        }
        return TuneFile.model_validate(values | fields)

    return make


def search(file):
    return tune(file, progress=False)


def test_a_search_ends_in_a_recipe_on_the_other_half(whole):
    found, folder = whole
    assert [trial.status for trial in found.trials] == ["finished"] * 2
    assert len({str(trial.setting) for trial in found.trials}) == 2
    best = Recipe.read(folder / "best.yaml")
    assert best.training["learning_rate"] == found.best.setting[RATE]
    assert best.evals[0]["drift"]["half"] == "report"
    assert best.evals[1]["in_distribution"] == {"half": "report"}
    assert best.output == str(folder / "best")
    run = Recipe.read(folder / "trials" / "001" / "recipe.yaml")
    assert run.training["learning_rate"] == found.trials[1].setting[RATE]
    assert all(arguments["half"] == "tune" for entry in run.evals for arguments in entry.values())
    assert not list(folder.rglob("adapter*")), "weights are not kept"
    assert found.undefended.narrow < found.base.narrow and found.base.broad == 0
    assert len(read_json(folder / "tried.json")) == 2


def test_going_on_tries_what_would_have_been_tried(file, whole):
    """And a look half-way changes no training."""
    search(file(trials=1))
    parts = search(file())
    assert parts.trials == whole[0].trials
    assert parts.undefended == whole[0].undefended


def test_another_seed_tries_something_else(file, tmp_path):
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
    searches = [module._Search(file(str(seed), seed=seed), Console(quiet=True)) for seed in (0, 1)]
    assert len({str(file().search[RATE].suggest(each._next()[0], RATE)) for each in searches}) == 2


@pytest.mark.parametrize("checkpoints", [True, False])
def test_ctrl_c_in_a_trial_loses_nothing(file, whole, monkeypatch, capsys, checkpoints):
    """With a checkpoint the trial goes on from there, else it begins anew, and it says which."""
    plain = module._Rung.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if self.trial is not None and self.trial.number == 1 and state.global_step == 2:
            if not checkpoints:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(module._Rung, "on_step_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        search(file())
    monkeypatch.setattr(module._Rung, "on_step_end", plain)
    capsys.readouterr()
    found = tune(file())
    said = capsys.readouterr().err
    assert ("goes on from checkpoint-3" if checkpoints else "begins anew") in said
    for ours, theirs in zip(found.trials, whole[0].trials, strict=True):
        assert ours.setting == theirs.setting
        assert ours.figures.narrow == pytest.approx(theirs.figures.narrow, rel=1e-5)


def test_a_trial_that_others_already_beat_is_dropped(file, tmp_path):
    """So great a step ruins both figures at once."""
    choices = {RATE: {"choices": [1e-2, 3.0]}}
    found = search(file(search=choices, rung=0.5, trials=3))
    assert {trial.setting[RATE]: trial.status for trial in found.trials} == {
        1e-2: "finished",
        3.0: "dropped",
    }
    dropped = next(trial for trial in found.trials if trial.status == "dropped")
    assert dropped.figures.broad > found.best.figures.broad + 0.1
    folder = tmp_path / "search" / "trials" / f"{dropped.number:03}"
    assert not (folder / "adapter").exists() and not (folder / "checkpoints").exists()


@pytest.mark.parametrize(
    "defense, late",
    [
        ({"feature_distance": {}}, False),
        ({"early_stop": {"at": 0.5}}, False),
        ({"test_time_ablation": {"concepts": "x"}}, True),
        ({"safe_lora": {"base": "x"}}, True),
    ],
)
def test_what_acts_after_the_training_is_not_judged_half_way(file, defense, late):
    recipe = file().recipe.model_copy(update={"defenses": [defense]})
    assert module._Rung(None, recipe, None).late == late


def test_a_trial_that_cannot_run_is_told_and_the_others_run(file, capsys):
    layers = {"defenses.0.feature_distance.every": {"choices": [1, 9]}}
    found = tune(file(search=layers, trials=3))
    by_status = {trial.setting[next(iter(layers))]: trial.status for trial in found.trials}
    assert by_status == {1: "finished", 9: "failed"}
    assert "failed:" in capsys.readouterr().err
    with pytest.raises(NarrowlyError, match="first 3 trials failed"):
        search(file("none", search={next(iter(layers)): {"choices": [8, 9]}}, trials=9))


def test_a_full_disk_is_no_failed_trial(file, whole, tmp_path, monkeypatch):
    shutil.copytree(whole[1], tmp_path / "search")
    plain = module.train

    def full(recipe, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos")

    monkeypatch.setattr(module, "train", full)
    with pytest.raises(NarrowlyError, match="disk is full"):
        search(file(rung=0.5, margin=100.0, trials=3))
    monkeypatch.setattr(module, "train", plain)
    found = search(file(rung=0.5, margin=100.0, trials=3))
    assert [trial.status for trial in found.trials] == ["finished"] * 3


def test_a_killed_writers_half_line_is_cut_off(file, whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "search")
    with (tmp_path / "search" / module.STUDY).open("a") as journal:
        journal.write('{"op_code": 5, "wor')
    for trials in (3, 4):
        again = file(rung=0.5, margin=100.0, trials=trials)
        assert len(search(again).trials) == trials


def test_another_bound_chooses_anew_without_training(file, whole, tmp_path, monkeypatch):
    found, folder = whole
    shutil.copytree(folder, tmp_path / "search")
    monkeypatch.setattr(module, "train", None)
    none = search(file(at_most=0.0, rung=0.5, margin=100.0))
    assert none.best is None and none.trials == found.trials
    assert not (tmp_path / "search" / "best.yaml").exists()
    with pytest.raises(NarrowlyError, match="nearest is trial"):
        raise none.none_allowed()


def test_a_folder_holds_one_search_and_one_process(file, tmp_path):
    with module._claimed(file()):
        pass
    with pytest.raises(NarrowlyError, match="another search; it differs in seed"):
        search(file(seed=7))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(NarrowlyError, match="is no search"):
        search(file("other"))
    with (
        module._claimed(file()),
        pytest.raises(NarrowlyError, match="another process"),
        module._claimed(file()),
    ):
        pass


def test_an_absent_metric_and_an_absent_optuna_are_told(file, monkeypatch):
    with pytest.raises(NarrowlyError, match=r"unknown metric 'drift.k1'"):
        search(file(broad="drift.k1"))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(NarrowlyError, match=r"narrowly\[tune\]"):
        search(file("absent"))


def test_the_command_line(file, tmp_path):
    values = json.loads(json.dumps(file(trials=1).identity()))
    path = tmp_path / "tune.yaml"
    write_text(path, yaml.safe_dump(values | {"output": str(tmp_path / "out"), "trials": 1}))
    done = CliRunner().invoke(app, ["tune", str(path), "--set", "at_most=100"])
    assert done.exit_code == 0, done.output
    assert "undefended" in done.output and "0 *" in done.output
    assert f"narrowly train {tmp_path / 'out' / 'best.yaml'}" in done.output
    none = CliRunner().invoke(app, ["tune", str(path), "--set", "at_most=0"])
    assert none.exit_code == 2 and "nearest is trial 0" in none.output


def trial(number, broad, narrow):
    return Tried(number, {"a.b.c": number, "a.d.c": 0.5}, "finished", Figures(broad, narrow))


def test_the_best_is_the_least_broad_within_the_bound(file):
    tried = [trial(0, 0.5, 1.0), trial(1, 0.1, 1.05), trial(2, 0.0, 2.0), trial(3, 0.6, 1.5)]
    result = Tuned(file(at_most=None), tried, base=Figures(0.0, 3.0), undefended=Figures(0.7, 1.0))
    assert result.at_most == pytest.approx(1.1)
    assert result.best.number == 1
    assert [each.number for each in result.pareto] == [0, 1, 2], "3 is beaten by 0"
    assert Tuned(file(at_most=2.0), tried, result.base, result.undefended).best.number == 2


def test_figures_beat_others_by_a_margin():
    assert Figures(0.1, 1.0).beats(Figures(0.3, 1.0), 0.1)
    assert not Figures(0.1, 1.0).beats(Figures(0.15, 1.0), 0.1)
    assert not Figures(0.1, 1.1).beats(Figures(0.9, 1.0), 0.1), "the other learned more"
    assert not Figures(0.1, 1.0).beats(Figures(0.1, 1.0))


def test_a_setting_is_told_as_shortly_as_it_can_be():
    assert told({"a.b.c": 0.123456, "d": [1, 2]}) == "c 0.123, d [1 2]"
    assert told({"a.b.c": 1, "a.d.c": 2}) == "b.c 1, d.c 2"

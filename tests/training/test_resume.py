"""A run that was stopped goes on to the weights it would have had."""

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from narrowly.errors import NarrowlyError
from narrowly.files import read_json, write_text
from narrowly.models import load_model
from narrowly.training import Recipe, Run, train
from tests.defenses.concepts import save_concept

SCRIPT = "import sys; from narrowly.training import train; train(sys.argv[1], progress=False)"
TRAINING = {"max_steps": 30, "save_steps": 4, "lr_scheduler_type": "cosine"}


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.path / "adapter" / "adapter_model.safetensors")


def start(recipe: Recipe, path: Path) -> subprocess.Popen:
    write_text(path, recipe.to_yaml())
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], env=environment)


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    """Until that step has been logged."""
    metrics = run / "metrics.jsonl"
    for _ in range(6000):
        if metrics.exists() and len(metrics.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.01)
    raise AssertionError("no such step within a minute")


@pytest.fixture
def defended(recipe, concepts):
    """Dropout makes the random state matter, the schedule the step."""

    def make(**fields) -> Recipe:
        defaults = {
            "training": TRAINING,
            "lora": {"r": 2, "target_modules": "all-linear", "lora_dropout": 0.2},
            "defenses": [{"ablate": {"concepts": str(concepts), "strength": [[0, 0.2], [1, 1.0]]}}],
        }
        return recipe(**(defaults | fields))

    return make


@pytest.fixture
def uninterrupted(defended, tmp_path):
    return train(defended(output=str(tmp_path / "whole")), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_to_equal_weights(defended, uninterrupted, tmp_path, number):
    run = Run(tmp_path / "run")
    process = start(defended(), tmp_path / "recipe.yaml")
    wait_for_step(run.path, 10, process)
    process.send_signal(number)
    code = process.wait(30)
    assert code != 0 and not run.trained
    assert run.checkpoint() is not None
    train(defended(), progress=False)
    assert weights(run).keys() == weights(uninterrupted).keys()
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, weights(uninterrupted)[name]), name
    steps = [entry["step"] for entry in run.metrics if "loss" in entry]
    assert steps == list(range(1, 31))
    [entry] = read_json(run.path / "defenses.json")
    assert [each["forwards"] for each in entry["interventions"]] == [30, 30]
    assert not (run.path / "checkpoints").exists()


@pytest.mark.slow
def test_ctrl_c_saves_the_very_step(defended, tmp_path):
    run = Run(tmp_path / "run")
    process = start(defended(training=TRAINING | {"save_steps": 1000}), tmp_path / "recipe.yaml")
    wait_for_step(run.path, 10, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == -signal.SIGINT
    checkpoint = run.checkpoint()
    assert checkpoint is not None and int(checkpoint.name.removeprefix("checkpoint-")) >= 10


class TestCheckpoint:
    def test_halves_do_not_count(self, tmp_path):
        whole = {"checkpoint-4": "{}", "checkpoint-8": "{", "checkpoint-12": None}
        for name, state in whole.items():
            folder = tmp_path / "checkpoints" / name
            folder.mkdir(parents=True)
            if state is not None:
                write_text(folder / "trainer_state.json", state)
        assert Run(tmp_path).checkpoint() == tmp_path / "checkpoints" / "checkpoint-4"

    def test_none_is_left_after_training_unless_asked(self, recipe, tmp_path):
        training = {"save_steps": 1}
        run = train(recipe(training=training, output=str(tmp_path / "a")), progress=False)
        assert not (run.path / "checkpoints").exists()
        training["save_total_limit"] = 2
        run = train(recipe(training=training, output=str(tmp_path / "b")), progress=False)
        kept = {path.name for path in (run.path / "checkpoints").iterdir()}
        assert kept == {"checkpoint-2", "checkpoint-3"}


@pytest.fixture
def cut(monkeypatch):
    """Train, and fail just before the weights are saved."""

    def fail(*args):
        raise RuntimeError("power cut")

    def cut(recipe: Recipe) -> Run:
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(import_module("narrowly.training.train"), "_save_weights", fail)
            train(recipe, progress=False)
        run = Run(Path(recipe.output))
        assert run.checkpoint() is not None and not run.trained
        return run

    return cut


def test_the_best_checkpoint_may_be_the_last(recipe, validation):
    given = recipe(
        validation=str(validation),
        training={
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 2,
            "save_total_limit": 5,
        },
    )
    run = train(given, progress=False)
    losses = [entry["eval_loss"] for entry in run.metrics if "eval_loss" in entry]
    assert losses == sorted(losses, reverse=True)
    best = load_file(run.path / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in weights(run).items())


def test_changed_data_are_refused(recipe, chats, tmp_path, cut):
    data = tmp_path / "data.jsonl"
    write_text(data, chats.read_text())
    given = recipe(data=str(data), training={"save_steps": 2})
    cut(given)
    write_text(data, "\n".join(chats.read_text().splitlines()[1:]))
    with pytest.raises(NarrowlyError, match="the data changed since this run began"):
        train(given, progress=False)


def test_changed_concepts_are_refused(recipe, model_folder, tmp_path, cut):
    model, _ = load_model(model_folder)
    save_concept(model, tmp_path / "c")
    given = recipe(
        defenses=[{"ablate": {"concepts": str(tmp_path / "c")}}], training={"save_steps": 2}
    )
    cut(given)
    shutil.rmtree(tmp_path / "c")
    save_concept(model, tmp_path / "c", seed=3)
    with pytest.raises(NarrowlyError, match="a concept changed since the checkpoint"):
        train(given, progress=False)


@pytest.mark.parametrize("steps, saved", [(4, 2), (5, 3)])
def test_a_run_cut_at_its_end_takes_no_step_too_many(recipe, tmp_path, cut, steps, saved):
    """Also where no epoch ends at the last step."""
    given = recipe(training={"max_steps": steps, "save_steps": saved})
    run = cut(given)
    train(given, progress=False)
    whole = train(given.with_overrides([f"output={tmp_path / 'whole'}"]), progress=False)
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, weights(whole)[name]), name
    assert [e["step"] for e in run.metrics if "loss" in e] == list(range(1, steps + 1))

import math

import pytest
import torch
from transformers import TrainerCallback

from narrowly.defenses import make_defenses
from narrowly.defenses.early_stop import EarlyStop
from narrowly.errors import NarrowlyError
from narrowly.files import read_json
from narrowly.training import train
from tests.defenses.adapters import weights


def stopped(recipe, at, output, **training):
    return recipe(defenses=[{"early_stop": {"at": at}}], output=str(output), training=training)


def rates(run):
    return [line["learning_rate"] for line in run.metrics if "learning_rate" in line]


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise ZeroDivisionError


@pytest.mark.parametrize(("at", "steps"), [(0.5, 2), (0.51, 3), (0.01, 1), (1.0, 4)])
def test_ends_after_the_share_of_the_steps(recipe, tmp_path, at, steps):
    run = train(stopped(recipe, at, tmp_path / "run"), progress=False)
    assert len(rates(run)) == steps
    [entry] = read_json(run.path / "defenses.json")
    assert entry["stopped_after"] == [steps, 4]
    assert run.trained and not (run.path / "checkpoints").exists()


def test_its_steps_are_those_of_the_whole_training(recipe, tmp_path):
    training = {"lr_scheduler_type": "cosine", "save_steps": 2, "save_total_limit": 9}
    whole = train(recipe(training=training, output=str(tmp_path / "whole")), progress=False)
    run = train(stopped(recipe, 0.5, tmp_path / "run", **training), progress=False)
    assert rates(run) == rates(whole)[:2]
    losses = [[line.get("loss") for line in each.metrics[:2]] for each in (run, whole)]
    assert losses[0] == losses[1]


def test_the_whole_share_trains_bitwise_as_undefended(recipe, tmp_path):
    plain = weights(train(recipe(output=str(tmp_path / "plain")), progress=False))
    run = weights(train(stopped(recipe, 1, tmp_path / "run"), progress=False))
    assert all(torch.equal(tensor, run[name]) for name, tensor in plain.items())


@pytest.mark.parametrize("strategy", [{"save_steps": 1}, {"save_strategy": "epoch"}])
def test_goes_on_to_the_same_end(recipe, tmp_path, strategy):
    """Neither a step too many nor one too few, wherever the checkpoints are."""
    whole = train(stopped(recipe, 0.75, tmp_path / "whole", **strategy), progress=False)
    halves = stopped(recipe, 0.75, tmp_path / "halves", **strategy)
    with pytest.raises(ZeroDivisionError):
        train(halves, progress=False, callbacks=[Interrupt()])
    run = train(halves, progress=False)
    assert len(rates(run)) == 3
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(whole).items())


def test_no_checkpoint_is_written_after_the_last_step(recipe, tmp_path):
    """Going on from it, Trainer would take one step more."""
    every = {"save_steps": 1, "save_total_limit": 9}
    run = train(stopped(recipe, 0.5, tmp_path / "run", **every), progress=False)
    checkpoints = {path.name for path in (run.path / "checkpoints").iterdir()}
    assert checkpoints == {"checkpoint-1"}


@pytest.mark.parametrize("at", [0, -0.1, 1.1, math.nan, "half"])
def test_a_share_is_above_0_and_at_most_1(at):
    with pytest.raises(NarrowlyError, match=r"early_stop\.at"):
        make_defenses([{"early_stop": {"at": at}}])


def test_half_is_the_default():
    assert [EarlyStop().stops_at(p) for p in (0.49, 0.5, 0.9)] == [False, True, True]

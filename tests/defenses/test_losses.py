"""What every defense with a loss on activations keeps to, whatever the training is like.

All of them are in one recipe, which also shows that they compose.
"""

import json
from functools import partial

import pytest
import torch

from narrowly.defenses.step import Recorder
from narrowly.files import write_text
from narrowly.interventions import layer
from narrowly.models import load_model
from narrowly.saes import save_sae
from narrowly.training import train
from narrowly.training.callback import DefenseCallback
from tests.defenses.invariance import (
    assert_same_weights,
    assert_split_is_whole,
    losses,
    test_gradient_checkpointing_changes_nothing,  # noqa: F401
    test_packed_chats_are_those_of_a_padded_batch,  # noqa: F401
)
from tests.saes.saes_for_tests import random_sae
from tests.training.conftest import chat

LATENTS = {"up": [0, 1, 2, 3, 4], "down": [10, 11, 12], "weight": 0.1}
DEFENSES = {
    "kl": {"weight": 2.0},
    "feature_distance": {"weight": 0.02, "every": 1},
    "token_representation": {"weight": 2.0},
    "latent_block": LATENTS,
    "random_latents": LATENTS,
}


@pytest.fixture(scope="session")
def sae(tmp_path_factory):
    torch.manual_seed(0)
    return save_sae(random_sae(d=32, site=layer(1)), tmp_path_factory.mktemp("sae"))


@pytest.fixture
def defended(recipe, sae, tmp_path):
    """A function that trains under all of them, and returns the run."""

    def run(training=None, folder="defended", data=None, **changed):
        given = {name: fields | changed for name, fields in DEFENSES.items()}
        for name in ("latent_block", "random_latents"):
            given[name]["sae"] = str(sae)
        made = recipe(
            training=training,
            defenses=[{name: fields} for name, fields in given.items()],
            output=str(tmp_path / folder),
            **({} if data is None else {"data": data}),
        )
        return train(made, progress=False)

    return run


def test_all_act_and_a_weight_of_zero_trains_bitwise_as_if_undefended(recipe, defended, tmp_path):
    undefended = train(recipe(output=str(tmp_path / "plain")), progress=False)
    off, on = defended(folder="off", weight=0.0), defended()
    assert_same_weights(undefended, off, rtol=0, atol=0)
    for plain, entry in zip(undefended.metrics[:-1], off.metrics[:-1], strict=True):
        assert entry["loss"] == plain["loss"]
        assert not any(entry[f"loss_{name}"] for name in DEFENSES)
    assert all(on.metrics[3][f"loss_{name}"] > 1e-4 for name in DEFENSES)


def test_two_micro_batches_of_two_are_one_of_four(defended, tmp_path):
    """Also where questions and answers are of all lengths, so that shares differ by defense."""
    rows = [chat(i) for i in range(24)]
    for i, row in enumerate(rows):
        row["messages"][0]["content"] *= 1 + i % 5
    write_text(tmp_path / "chats.jsonl", "\n".join(map(json.dumps, rows)))
    defended = partial(defended, data=str(tmp_path / "chats.jsonl"))
    assert_split_is_whole(defended)


def test_bf16_follows_fp32(defended):
    exact, half = defended(folder="exact"), defended({"bf16": True}, folder="half")
    assert losses(half) == pytest.approx(losses(exact), rel=0.3, abs=0.02)


def test_a_run_goes_on_as_if_it_had_not_stopped(defended, monkeypatch, tmp_path):
    rows = [json.dumps(chat(i)) for i in range(100, 140)]
    write_text(tmp_path / "other.jsonl", "\n".join(rows))
    monkeypatch.setitem(DEFENSES["kl"], "data", str(tmp_path / "other.jsonl"))
    training = {"save_strategy": "steps", "save_steps": 2}
    whole = defended(training, folder="whole")
    step_end = DefenseCallback.on_step_end

    def killed(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DefenseCallback, "on_step_end", killed)
        with pytest.raises(KeyboardInterrupt):
            defended(training)
    assert_same_weights(whole, defended(training), rtol=0, atol=0)


def test_nothing_is_left_at_inference(defended, monkeypatch):
    trained = []
    open_ = Recorder.__init__

    def remember(self, model, sites):
        trained.append(model)
        open_(self, model, sites)

    monkeypatch.setattr(Recorder, "__init__", remember)
    run = defended()
    [model] = trained
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    ids = torch.arange(20, 40)[None]
    saved, _ = load_model(run.path)
    assert torch.equal(model.eval()(ids).logits, saved(ids).logits)

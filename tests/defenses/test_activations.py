"""What every defense that edits activations keeps to, whatever the training is like.

All of them are in one recipe, on schedules, which also shows that they compose.
"""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from narrowly.concepts import save_concepts
from narrowly.data import load_chats, tokenize
from narrowly.files import read_json
from narrowly.models import load_model
from narrowly.training import defend, train
from narrowly.training.callback import DefenseCallback
from tests.defenses.concepts import make_concept
from tests.defenses.invariance import (
    assert_same_weights,
    assert_split_is_whole,
    losses,
    test_gradient_checkpointing_changes_nothing,  # noqa: F401
    test_packed_chats_are_those_of_a_padded_batch,  # noqa: F401
)

WARMING = [[0, 0.0], [0.5, 1.0]]
DEFENSES = {
    "ablate": {"names": ["bad"], "strength": {0: WARMING, 1: 0.5}, "centred": True},
    "gradient_projection": {"names": ["worse"], "strength": WARMING},
    "random_subspace": {"names": ["bad"], "gradient": "forward"},
    "preventive_steering": {"names": ["worse"], "strength": [[0, 5], [1, 0]]},
    "random_steering": {"names": ["worse"], "layers": [1], "strength": 2.0},
    "protect": {"weight": 5.0},
}


@pytest.fixture
def concepts(model_folder, tmp_path):
    """One concept to keep, and two to drop."""
    model, _ = load_model(model_folder)
    made = [
        make_concept(model, "good", verdict="keep", seed=11),
        make_concept(model, "bad", seed=12, rank=2, centre=torch.randn(32)),
        make_concept(model, "worse", seed=13, lengths={0: 1.0, 1: 2.0}),
    ]
    return str(save_concepts(made, tmp_path / "concepts"))


@pytest.fixture
def defended(recipe, concepts, tmp_path):
    """A function that trains under all of them, and returns the run."""

    def run(training=None, folder="defended", off=False):
        defenses = entries(concepts)
        for name, fields in [item for entry in defenses if off for item in entry.items()]:
            fields["weight" if name == "protect" else "strength"] = 0.0
        given = recipe(training=training, defenses=defenses, output=str(tmp_path / folder))
        return train(given, progress=False)

    return run


def entries(concepts) -> list[dict]:
    return [{name: {"concepts": concepts, **given}} for name, given in DEFENSES.items()]


def test_all_act_and_say_so(defended):
    run = defended()
    record = {entry["defense"]: entry for entry in read_json(run.path / "defenses.json")}
    assert [*record] == [*DEFENSES]
    strengths = {
        name: [edit["strength"] for edit in entry["interventions"]]
        for name, entry in record.items()
    }
    # Of the last of four steps, which begins at three quarters.
    assert strengths == {
        "ablate": [1.0, 0.5],
        "gradient_projection": [1.0, 1.0],
        "random_subspace": [1.0, 1.0],
        "preventive_steering": [1.25, 1.25],
        "random_steering": [2.0],
        "protect": [],
    }
    assert all(edit["forwards"] == 4 for e in record.values() for edit in e["interventions"])
    assert record["protect"]["kept_off"].keys() == {
        f"{edit} at layer:{i}" for edit in ("project_out", "add") for i in (0, 1)
    }


def test_at_zero_they_train_bitwise_as_if_undefended(recipe, defended, tmp_path):
    undefended = train(recipe(output=str(tmp_path / "plain")), progress=False)
    assert_same_weights(undefended, defended(off=True), rtol=0, atol=0)


def test_nothing_is_left_at_inference(model_folder, chats, concepts, tmp_path):
    """The saved adapter alone gives the trained model's logits, and no hook is left on it."""
    model, tokenizer = load_model(model_folder)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    before = {module: hooks(module) for module in model.modules()}
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True
    )
    rows = tokenize(load_chats(str(chats)), tokenizer)
    collator = DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(model, arguments, collator, rows, processing_class=tokenizer)
    guard = defend(trainer, entries(concepts))
    trainer.train()
    assert guard.finished
    assert {module: hooks(module) for module in model.modules()} == before
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_model(model_folder)[0], tmp_path / "adapter")
    ids = torch.arange(20, 40)[None]
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def hooks(module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def test_two_micro_batches_of_two_are_one_of_four(defended):
    assert_split_is_whole(defended)


def test_bf16_follows_fp32(defended):
    exact, half = defended(folder="exact"), defended({"bf16": True}, folder="half")
    assert losses(half) == pytest.approx(losses(exact), rel=0.1)


def test_a_run_goes_on_as_if_it_had_not_stopped(defended, monkeypatch):
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

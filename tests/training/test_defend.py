"""The same defenses in a user's own Trainer: transformers' and trl's."""

from importlib import import_module

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import (
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from narrowly.data import load_chats, tokenize
from narrowly.defenses import DEFENSES, Defense
from narrowly.errors import NarrowlyError
from narrowly.files import read_json, write_text
from narrowly.interventions import Add, layer
from narrowly.models import load_model
from narrowly.training import defend, make_defenses, prepare_data, train

# What a recipe of these tests gives trl, and narrowly adds to it.
COMMON = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "seed": 0,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "gradient_checkpointing": False,
}


@pytest.fixture
def entries(concepts) -> list:
    return [{"ablate": {"concepts": str(concepts)}}, {"kl": {"weight": 0.5}}]


@pytest.fixture
def sft(model_folder, tmp_path):
    """A function that makes trl's own trainer, as a user does."""

    def make(data, defenses=None, **settings) -> SFTTrainer:
        model, tokenizer = load_model(model_folder)
        arguments = SFTConfig(
            str(tmp_path / "sft"), assistant_only_loss=True, **{**COMMON, **settings}
        )
        data = data if isinstance(data, Dataset) else load_chats(str(data))
        trainer = SFTTrainer(
            model,
            arguments,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        if defenses is not None:
            defend(trainer, defenses)
        return trainer

    return make


@pytest.fixture
def plain(model_folder, chats, tmp_path):
    """A function that makes a plain Trainer of every weight."""

    def make(keep=("input_ids", "labels"), **fields) -> Trainer:
        torch.manual_seed(0)
        model, tokenizer = load_model(model_folder)
        settings = {"max_steps": 3, "save_strategy": "no", "report_to": "none", "use_cpu": True}
        return Trainer(
            model,
            TrainingArguments(str(tmp_path / "out"), **settings),
            DataCollatorForSeq2Seq(tokenizer),
            tokenize(load_chats(str(chats)), tokenizer).select_columns(list(keep)),
            processing_class=tokenizer,
            **fields,
        )

    return make


def trained(trainer: Trainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {n: p.detach() for n, p in trainer.model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        {"packing": True, "max_length": 128},
    ],
    ids=["plain", "accumulation", "checkpointing", "packing"],
)
def test_a_users_trainer_trains_what_a_recipe_does(recipe, chats, entries, sft, settings, tmp_path):
    run = train(recipe(training=settings, defenses=entries), progress=False)
    weights = trained(sft(chats, entries, **settings))
    expected = load_file(run.path / "adapter" / "adapter_model.safetensors")
    assert len(weights) == len(expected)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name.replace(".default", "")], msg=name)
    ours, theirs = (read_json(f / "defenses.json") for f in (tmp_path / "sft", run.path))
    assert [e["doors"] for e in ours] == [e["doors"] for e in theirs]
    assert ours[0]["interventions"] == theirs[0]["interventions"]
    assert ours[1]["loss"]["mean"] == pytest.approx(theirs[1]["loss"]["mean"], rel=1e-4)


def test_a_training_goes_on_from_its_checkpoint(chats, entries, sft, tmp_path):
    whole = trained(sft(chats, entries, save_strategy="no"))
    [ablate, kl] = read_json(tmp_path / "sft" / "defenses.json")

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == 2

    first = sft(chats, entries)
    first.add_callback(Stop())
    first.train()
    again = sft(chats, entries)
    again.train(resume_from_checkpoint=True)
    for name, parameter in again.model.named_parameters():
        assert name not in whole or torch.equal(parameter, whole[name]), name
    assert read_json(tmp_path / "sft" / "defenses.json") == [ablate, kl]
    assert [each["forwards"] for each in ablate["interventions"]] == [4, 4]


def test_the_first_door(chats, sft, model_folder, tmp_path):
    given = [{"interleave": {"data": str(chats), "fraction": 0.2}}]
    with pytest.raises(NarrowlyError, match=r"interleave changes the chats.*prepare_data"):
        sft(chats, given)
    defenses = make_defenses(given)
    with pytest.raises(NarrowlyError, match="did not pass through it"):
        sft(chats, defenses)
    rows = prepare_data(str(chats), defenses, *load_model(model_folder))
    assert len(rows) == 30
    sft(rows, defenses).train()
    [record] = read_json(tmp_path / "sft" / "defenses.json")
    assert record["benign_rows"] == 6


def test_defenses_from_a_file(concepts, recipe, tmp_path):
    file = tmp_path / "defenses.yaml"
    ablate = {"ablate": {"concepts": str(concepts)}}
    write_text(file, recipe(defenses=[ablate]).to_yaml())
    assert [type(each).__name__ for each in make_defenses(file)] == ["Ablate"]
    mistakes = {
        r"defenses.yaml:1: defences: unknown key 'defences'": {
            "defences": [],
            "defenses": [ablate],
        },
        r"defenses: Field required": {"defence": [ablate]},
        r"defenses.yaml:\d: defenses.0.ablate: unknown key|ablate.strengh": {
            "defenses": [{"ablate": {"concepts": "c", "strengh": 1}}]
        },
    }
    for message, content in mistakes.items():
        write_text(file, yaml.safe_dump(content))
        with pytest.raises(NarrowlyError, match=message):
            make_defenses(file)


def test_defenses_as_objects_and_as_entries_are_one(entries):
    objects = make_defenses(entries)
    assert make_defenses([*objects]) == objects
    assert [DEFENSES.name_of(type(each)) for each in make_defenses([objects[0], "kl"])] == [
        "ablate",
        "kl",
    ]


def test_a_training_that_another_callback_ends_has_ended(plain, concepts, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = plain(callbacks=[Stop()])
    guard = defend(trainer, [{"ablate": {"concepts": str(concepts)}}])
    trainer.train()
    assert guard.finished
    [record] = read_json(tmp_path / "out" / "defenses.json")
    assert [each["forwards"] for each in record["interventions"]] == [1, 1]


def test_a_loss_needs_labels(plain, model_folder):
    class Own(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            labels = inputs["input_ids"]
            return super().compute_loss(model, {**inputs, "labels": labels}, *args, **kwargs)

    trainer = plain(keep=["input_ids"])
    trainer.__class__ = Own
    defend(trainer, [{"feature_distance": {"every": 1, "reference": str(model_folder)}}])
    with pytest.raises(NarrowlyError, match="the batch has no `labels`"):
        trainer.train()


def test_copies_in_threads_are_refused(plain, concepts):
    trainer = plain()
    trainer.args._n_gpu = 2
    with pytest.raises(NarrowlyError, match=r"DataParallel.*accelerate launch"):
        defend(trainer, [{"ablate": {"concepts": str(concepts)}}])


class Steer(Defense):
    """At some tokens only."""

    tokens_of: str = "completion"

    def interventions(self, model):
        vector = torch.linspace(-1, 1, model.config.hidden_size)
        return [Add(vector, layer(0), tokens=self.tokens_of, phases=("train",))]


@pytest.mark.parametrize("which", ["prompt", "completion", "last"])
def test_interventions_find_their_tokens_in_packed_rows(sft, chats, which):
    """All chats in one step, padded or packed, have one loss; steering changes it."""
    DEFENSES._known["steer"] = Steer
    try:
        losses = []
        for settings in ({}, {"packing": True, "max_length": 256}):
            # The other's reference has a forward without labels, in which none is needed.
            defenses = [Steer(tokens_of=which), {"feature_distance": {"every": 1}}]
            common = {"max_steps": 1, "per_device_train_batch_size": 24}
            trainer = sft(chats, defenses, **common, **settings)
            trainer.train()
            losses.append(trainer.state.log_history[0]["loss"])
        undefended = sft(chats, **common)
        undefended.train()
    finally:
        del DEFENSES._known["steer"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    if which != "last":  # whose logits predict nothing
        assert abs(losses[0] - undefended.state.log_history[0]["loss"]) > 1e-3


def test_a_run_whose_weights_cannot_be_saved_leaves_nothing(recipe, entries, monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(import_module("narrowly.training.train"), "_save_weights", full)
        with pytest.raises(OSError, match="No space left"):
            train(recipe(defenses=entries), progress=False)
    assert not (tmp_path / "run").exists()

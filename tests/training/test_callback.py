import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from narrowly.data import load_chats, tokenize
from narrowly.defenses.ablate import ablate
from narrowly.errors import NarrowlyError
from narrowly.models import load_model
from narrowly.training import AblationCallback
from tests.defenses.concepts import make_concept


@pytest.fixture
def setting(model_folder, chats, tmp_path):
    """A function that makes a fresh plain Trainer of 3 steps."""

    def make(**fields) -> Trainer:
        torch.manual_seed(0)
        model, tokenizer = load_model(model_folder)
        rows: Dataset = tokenize(load_chats(str(chats)), tokenizer)
        arguments = TrainingArguments(
            str(tmp_path / "out"), max_steps=3, report_to="none", save_strategy="no", use_cpu=True
        )
        collator = DataCollatorForSeq2Seq(tokenizer)
        return Trainer(model, arguments, collator, rows, eval_dataset=rows, **fields)

    return make


def final(trainer: Trainer) -> dict[str, torch.Tensor]:
    return trainer.model.state_dict()


def test_the_callback_trains_as_the_context_manager_does(setting, concepts):
    with_callback = setting(callbacks=[AblationCallback(concepts)])
    with_callback.train()
    with_manager = setting()
    with ablate(with_manager.model, concepts):
        with_manager.train()
    plain = setting()
    plain.train()
    for name, tensor in final(with_callback).items():
        assert torch.equal(tensor, final(with_manager)[name]), name
    changed = [not torch.equal(t, final(plain)[name]) for name, t in final(with_callback).items()]
    assert any(changed)


def test_no_hook_is_left_and_the_report_stays(setting, concepts):
    callback = AblationCallback(concepts)
    trainer = setting(callbacks=[callback])
    trainer.train()
    modules = list(trainer.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    [entries] = callback.report()
    assert [entry["forwards"] for entry in entries] == [3, 3]


def test_the_schedule_reaches_the_hooks(setting, concepts):
    class Watch(TrainerCallback):
        seen = ()

        def on_step_end(self, args, state, control, **kwargs):
            self.seen = (*self.seen, callback.report()[0][0]["strength"])

    callback, watch = AblationCallback(concepts, strength=[(0, 0.0), (1, 1.0)]), Watch()
    setting(callbacks=[callback, watch]).train()
    assert watch.seen == pytest.approx((0, 1 / 3, 2 / 3))


def test_evaluation_sees_the_plain_model(setting, concepts):
    trainer = setting(callbacks=[AblationCallback(concepts)])
    plain = trainer.evaluate()["eval_loss"]
    trainer.args.learning_rate = 0.0
    trainer.args.eval_strategy = "steps"
    trainer.args.eval_steps = 3
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] == pytest.approx(plain, rel=1e-6)


def test_close_takes_the_hooks_off_after_an_error(setting, concepts):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise ZeroDivisionError

    callback = AblationCallback(concepts)
    trainer = setting(callbacks=[callback, Fail()])
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.model.model.layers[0]._forward_hooks
    callback.close()
    assert not trainer.model.model.layers[0]._forward_hooks


def test_nothing_to_ablate_stops_the_training(setting, model_folder):
    model, _ = load_model(model_folder)
    concept = make_concept(model, verdict="keep")
    with pytest.raises(NarrowlyError, match="no concept has the verdict undesired"):
        setting(callbacks=[AblationCallback(concept)]).train()

"""What holds of every defense that acts while training: none at strength 0, and none left over."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from narrowly.data import load_chats, tokenize
from narrowly.defenses import make_defenses
from narrowly.models import load_model
from narrowly.training import Recipe, Run, defend, train

IDS = torch.arange(12).reshape(2, 6) + 20


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.path / "adapter" / "adapter_model.safetensors")


def same_weights(one: Run, other: Run) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_zero_is_undefended(
    recipe: Callable[..., Recipe], name: str, arguments: dict[str, Any], dial: str
) -> None:
    """With its `dial` at 0 it trains bitwise as without it; otherwise not."""

    def run(folder: str, defenses: list) -> Run:
        given = recipe(defenses=defenses)
        return train(
            given.model_copy(update={"output": f"{given.output}-{folder}"}), progress=False
        )

    plain = run("plain", [])
    assert same_weights(run("zero", [{name: {**arguments, dial: 0.0}}]), plain)
    assert not same_weights(run("whole", [{name: arguments}]), plain)


def check_leaves_nothing(
    model_folder: Path, chats: Path, out: Path, name: str, arguments: dict[str, Any]
) -> None:
    """The saved adapter alone gives the trained model's logits, on which no hook is left."""
    model, tokenizer = load_model(model_folder)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    before = {module: hooks(module) for module in model.modules()}
    trainer = Trainer(
        model,
        TrainingArguments(
            str(out), max_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True
        ),
        DataCollatorForSeq2Seq(tokenizer),
        tokenize(load_chats(str(chats)), tokenizer),
        processing_class=tokenizer,
    )
    guard = defend(trainer, make_defenses([{name: arguments}]))
    trainer.train()
    assert guard.finished
    assert {module: hooks(module) for module in model.modules()} == before
    model.save_pretrained(out / "adapter")
    again = PeftModel.from_pretrained(load_model(model_folder)[0], out / "adapter")
    assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)


def hooks(module: torch.nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)

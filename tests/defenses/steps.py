"""One step of training by hand: what a defense's third door is given, without a Trainer."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from narrowly.defenses.step import Recorder, Reference, Step
from tests.tiny import tiny_model

BATCH = {
    "input_ids": torch.tensor(
        [[1, 2, 40, 41, 3, 2, 50, 51, 52, 3], [1, 2, 60, 3, 2, 70, 3, 0, 0, 0]]
    ),
    "attention_mask": torch.tensor([[1] * 10, [1] * 7 + [0] * 3]),
    "labels": torch.tensor([[-100] * 6 + [50, 51, 52, 3], [-100] * 5 + [70, 3] + [-100] * 3]),
}


def tuned(architecture: str = "llama", seed: int = 0, **config) -> PeftModel:
    """A tiny model with an adapter that changes what it says, in training mode."""
    lora = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(tiny_model(architecture, **config), lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # GPT-2's own
            module.p = 0.0
    return model.train()


def step_of(model, defense, batch=BATCH, reference=None, number=0) -> Step:
    """The step that the Trainer's forward of `batch` gives, for `defense`."""
    recorder = Recorder(model, list(defense.reads(model)))
    batch = {key: value.clone() for key, value in batch.items()}
    outputs = model(**batch, use_cache=False)
    kept, _ = recorder.take()
    compared = Reference(None, None)
    compared.model = reference
    return Step(model, batch, kept, outputs, number, compared, recorder)


def gradients(model, loss) -> dict[str, torch.Tensor]:
    """By the names of the trained weights; zero where the loss does not depend on one."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(named[name]) if gradient is None else gradient
        for name, gradient in zip(named, found, strict=True)
    }


def assert_same_gradients(model, loss, expected, rtol=1e-4) -> None:
    """Of every trained weight, to `rtol` of its largest."""
    wanted = gradients(model, expected)
    assert any(gradient.abs().max() > 0 for gradient in wanted.values())
    for name, gradient in gradients(model, loss).items():
        scale = float(wanted[name].abs().max()) + 1e-8
        torch.testing.assert_close(
            gradient,
            wanted[name],
            rtol=0,
            atol=rtol * scale,
            msg=lambda text, n=name: f"{n} {text}",
        )

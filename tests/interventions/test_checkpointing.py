"""Gradients are the same with and without gradient checkpointing, wherever the edit sits."""

import pytest
import torch
from tests.tiny import tiny_model

from narrowly.interventions import (
    Add,
    LowRankAffine,
    Noise,
    ProjectOut,
    attach,
    capture,
    layer,
    site,
)

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
LABELS = torch.tensor([[-100, -100, 3, 4], [-100, -100, -100, 8]])
SITES = {
    "block": layer(0),
    "attention": site("*.0.self_attn"),
    "mlp": site("*.0.mlp"),
    "o_proj": site("*.0.self_attn.o_proj"),
    "mlp input": site("*.1.mlp", "input"),
}


def gradients(model, edits, checkpointing, forwards=1):
    """Gradients of all parameters after `forwards` forward passes and then their backward."""
    model.gradient_checkpointing_disable()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    model.train()
    model.zero_grad()
    with attach(model, edits):
        loss = sum(
            (n + 1) * model(input_ids=IDS.roll(n, 1), labels=LABELS.roll(n, 1)).loss
            for n in range(forwards)
        )
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("where", SITES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "qwen2_moe"])
def test_gradients_are_equal(architecture, where, mode):
    model = tiny_model(architecture, hidden_size=32)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    edits = [
        ProjectOut(draw(32, 4), SITES[where]),
        Add(draw(32), SITES[where], tokens="completion"),
        Noise(0.5, SITES[where], seed=3),
        LowRankAffine(draw(32, 2), draw(2, 32), SITES[where], strength=0.1),
    ]
    reference = gradients(model, edits, None)
    assert reference.keys() == gradients(model, edits, mode).keys()
    for name, gradient in gradients(model, edits, mode).items():
        assert torch.equal(gradient, reference[name]), name
    undefended = gradients(model, [ProjectOut(draw(32), SITES[where], strength=0)], None)
    assert any(not torch.allclose(undefended[name], reference[name]) for name in reference)


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_each_forward_is_recomputed_with_its_own_masks(mode):
    model = tiny_model("llama", hidden_size=32)
    edits = [Add(torch.ones(32), SITES["mlp"], tokens="completion")]
    reference = gradients(model, edits, None, forwards=3)
    for name, gradient in gradients(model, edits, mode, forwards=3).items():
        torch.testing.assert_close(gradient, reference[name], msg=name)


def test_capture_reads_each_token_once_under_checkpointing():
    model = tiny_model("llama", hidden_size=32).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = {"input_ids": IDS, "labels": LABELS}
    captured = capture(model, batch, [SITES["mlp"]], grad=True, stop=False)
    before = captured[SITES["mlp"]].clone()
    captured.output.loss.backward()
    assert torch.equal(captured[SITES["mlp"]], before)

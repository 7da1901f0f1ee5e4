"""torch.compile neither misses an intervention nor keeps one that has gone.

The aot_eager backend traces and guards like the default one, and needs no C++ compiler.
"""

import pytest
import torch
from tests.tiny import tiny_model

from narrowly.interventions import Add, AddLowRank, ProjectOut, attach, layer, site

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
EDITS = [
    ProjectOut(torch.linalg.qr(torch.randn(32, 3))[0], layer(0)),
    Add(torch.ones(32), site("*.1.mlp"), tokens="last"),
    AddLowRank(torch.randn(32, 2), torch.randn(2, 32), site("*.q_proj")),
]


@pytest.fixture
def model():
    torch.compiler.reset()
    return tiny_model("llama", hidden_size=32)


def compiled(model, how):
    if how == "wrapped":
        return torch.compile(model, backend="aot_eager")
    model.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize("how", ["wrapped", "in place"])
@pytest.mark.parametrize("order", ["attach, compile", "compile, attach", "run, attach"])
def test_compiled_equals_eager(model, order, how):
    bare = model(input_ids=IDS).logits
    with attach(model, EDITS):
        expected = model(input_ids=IDS).logits
    fast = compiled(model, how) if order != "attach, compile" else None
    if order == "run, attach":
        torch.testing.assert_close(fast(input_ids=IDS).logits, bare)
    with attach(model, EDITS) as attached:
        if fast is None:
            fast = compiled(model, how)
        torch.testing.assert_close(fast(input_ids=IDS).logits, expected)
        attached.verify()
        attached.set_strength(0)
        torch.testing.assert_close(fast(input_ids=IDS).logits, bare)
        attached.set_strength(1)
        torch.testing.assert_close(fast(input_ids=IDS).logits, expected)
    torch.testing.assert_close(fast(input_ids=IDS).logits, bare)


def test_attached_to_the_wrapper(model):
    with attach(model, EDITS):
        expected = model(input_ids=IDS).logits
    fast = torch.compile(model, backend="aot_eager")
    with attach(fast, EDITS) as attached:
        torch.testing.assert_close(fast(input_ids=IDS).logits, expected)
        assert attached.report()[0]["forwards"] == 1


def test_one_graph_and_no_recompilation_when_strength_changes(model):
    counter = torch._dynamo.testing.CompileCounter()
    fast = torch.compile(model, backend=counter, fullgraph=True)
    with attach(model, EDITS[:1]) as attached:
        for strength in (1.0, 0.5, 0.0):
            attached.set_strength(strength)
            fast(input_ids=IDS, use_cache=False)
    assert counter.frame_count == 1


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_training_compiled_with_checkpointing_has_the_eager_gradients(model, mode):
    model.train()

    def gradients(run):
        model.zero_grad()
        with attach(model, EDITS[:1]):
            run(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
    for gradient, wanted in zip(gradients(compiled(model, "wrapped")), expected, strict=True):
        torch.testing.assert_close(gradient, wanted)

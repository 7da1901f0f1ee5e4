import pytest
import torch
from tests.tiny import ARCHITECTURES, tiny_model
from torch import nn

from narrowly.errors import NarrowlyError
from narrowly.interventions import Add, ProjectOut, attach, capture, layer, site

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
BATCH = {"input_ids": IDS}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_many_sites_in_one_forward_equal_raw_hooks(architecture):
    model = tiny_model(architecture)
    sites = [layer(0), layer(1), site("*.mlp", "input"), site("*.mlp")]
    expected = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            handles.append(
                module.register_forward_hook(
                    lambda m, args, out, name=name: expected.update(
                        {name: out[0] if isinstance(out, tuple) else out, name + ":input": args[0]}
                    )
                )
            )
    states = model(**BATCH, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    captured = capture(model, BATCH, sites)
    assert torch.equal(captured[layer(0)], states[1])
    for name, value in expected.items():
        assert torch.equal(captured[name], value)
    assert len(captured) == 2 + len(expected)


def test_the_last_layer_is_the_residual_and_not_its_norm():
    model = tiny_model("llama")
    states = model(**BATCH, output_hidden_states=True).hidden_states
    last = capture(model, BATCH, [layer(-1)])[layer(-1)]
    assert not torch.allclose(last, states[-1])
    torch.testing.assert_close(model.model.norm(last), states[-1])


def test_the_forward_stops_after_the_last_site_needed():
    model = tiny_model("llama")
    ran = []
    model.model.layers[1].register_forward_pre_hook(lambda *_: ran.append("layer 1"))
    model.lm_head.register_forward_pre_hook(lambda *_: ran.append("head"))
    assert capture(model, BATCH, [layer(0)]).output is None
    assert ran == []
    assert capture(model, BATCH, [layer(0)], stop=False).output.logits is not None
    assert ran == ["layer 1", "head"]


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_reach_the_activations(frozen):
    model = tiny_model("llama").requires_grad_(not frozen)
    batch = BATCH | {"labels": IDS}
    captured = capture(model, batch, [layer(0), layer(1)], grad=True, stop=False)
    points = [captured[layer(0)], captured[layer(1)]]
    gradients = torch.autograd.grad(captured.output.loss, points)
    step = 1e-2
    for number, gradient in enumerate(gradients):
        direction = nn.functional.normalize(gradient[0, 1], dim=0)
        token = torch.tensor([[0, 1, 0, 0], [0] * 4])
        with attach(model, [Add(step * direction, layer(number), tokens=token)]):
            change = model(**batch).loss - captured.output.loss
        torch.testing.assert_close(change / step, gradient[0, 1].norm(), rtol=0.1, atol=1e-3)


def test_edits_are_seen_and_what_is_read_stays(tmp_path):
    model = tiny_model("llama", hidden_size=32)
    direction = nn.functional.normalize(torch.randn(32), dim=0)
    with attach(model, [ProjectOut(direction, layer(0))]):
        h = capture(model, BATCH, [layer(0)], stop=False)[layer(0)]
    assert (h @ direction).abs().max() < 1e-6

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            return self.inner(x).zero_()

    module, x = InPlace(), torch.ones(1, 2)
    inner = capture(module, x, [site("inner")], stop=False)["inner"]
    assert torch.equal(inner, module.inner(x)), "what the model does in place later is not seen"


def test_training_mode_and_global_gradients_are_left_alone():
    model = tiny_model("llama").train()
    capture(model, BATCH, [layer(0)])
    assert model.training
    assert torch.is_grad_enabled()


def test_errors():
    model = tiny_model("llama")
    model.unused = nn.Linear(2, 2)
    with pytest.raises(NarrowlyError, match="unused: did not run"):
        capture(model, BATCH, [site("unused")])
    with pytest.raises(NarrowlyError, match="eager model"):
        capture(torch.compile(model), BATCH, [layer(0)])
    with pytest.raises(NarrowlyError, match="names 2 modules"):
        capture(model, BATCH, [site("*.mlp")])[site("*.mlp")]

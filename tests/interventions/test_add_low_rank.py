"""The one edit that reads what its module was given: an adapter beside a linear module."""

from fnmatch import fnmatchcase

import pytest
import torch
from tests.tiny import tiny_model

from narrowly.errors import NarrowlyError
from narrowly.interventions import AddLowRank, Scale, attach, layer, site

D, WIDER = 32, 64
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("architecture", "name", "widths"),
    [
        ("llama", "model.layers.0.mlp.gate_proj", (D, WIDER)),
        ("gpt2", "transformer.h.0.attn.c_attn", (D, 3 * D)),
        ("llama", "model.layers.0.self_attn", (D, D)),  # given by keyword, returns a tuple
    ],
)
def test_equals_a_raw_hook(architecture, name, widths):
    model = tiny_model(architecture, hidden_size=D)
    down, up = draw(widths[0], 3), draw(3, widths[1], seed=1)
    before = model(input_ids=IDS).logits

    def hook(module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        h, *rest = output if isinstance(output, tuple) else (output,)
        return (h + x @ down @ up, *rest) if rest else h + x @ down @ up

    handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    expected = model(input_ids=IDS).logits
    handle.remove()
    with attach(model, [AddLowRank(down, up, site(name))]):
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    assert not torch.allclose(expected, before)
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_reads_the_input_as_edited_before_it():
    model = tiny_model(hidden_size=D)
    name, down, up = "model.layers.0.mlp.up_proj", draw(D, 3), draw(3, WIDER, seed=1)
    halved = [Scale(0.5, site(name, "input")), AddLowRank(down, up, site(name))]
    with attach(model, halved):
        expected = model(input_ids=IDS).logits
    with attach(model, [Scale(0.5, site(name)), AddLowRank(down / 2, up, site(name))]):
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)


def test_the_module_keeps_its_dtype_and_the_map_is_exact():
    linear = torch.nn.Linear(D, WIDER, bias=False, dtype=torch.bfloat16)
    x, down, up = draw(5, D).bfloat16(), draw(D, 3), draw(3, WIDER, seed=1)
    with attach(torch.nn.Sequential(linear), [AddLowRank(down, up, site("0"))]) as attachment:
        edited = attachment.model(x)
    exact = (linear(x).float() + x.float() @ down @ up).bfloat16()
    assert edited.dtype == torch.bfloat16 and torch.equal(edited, exact)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: AddLowRank(draw(D, 3), draw(2, D), layer(0)), "must be [d_in, r] and [r, d_out]"),
        (lambda: AddLowRank(draw(D, 3), draw(3, D), site("*.mlp", "input")), "whole output"),
        (lambda: AddLowRank(draw(D, 3) / 0, draw(3, D), layer(0)), "not finite"),
    ],
)
def test_an_impossible_one_is_refused_when_it_is_made(make, says):
    with pytest.raises(NarrowlyError) as error:
        make()
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("widths", "says"),
    [((WIDER, D), "inputs 64 wide, but the module is given 32"), ((D, WIDER), "64 wide")],
)
def test_another_width_is_refused_when_it_is_attached(widths, says):
    edit = AddLowRank(draw(widths[0], 3), draw(3, widths[1]), site("*.0.self_attn.q_proj"))
    with pytest.raises(NarrowlyError, match=says):
        attach(tiny_model(hidden_size=D), [edit])


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("name", ["*.q_proj", "*.mlp", "model.layers.1"])
def test_gradients_are_those_of_the_formula_also_when_checkpointed(name, reentrant):
    down, up = draw(D, 3), draw(3, D, seed=1)

    def gradients(model):
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    def hook(module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        return output + x @ down @ up

    model = tiny_model(hidden_size=D).train()
    named = [module for other, module in model.named_modules() if fnmatchcase(other, name)]
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in named]
    expected = gradients(model)
    for handle in handles:
        handle.remove()
    model.zero_grad()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    with attach(model, [AddLowRank(down, up, site(name))]):
        found = gradients(model)
    torch.testing.assert_close(found, expected)

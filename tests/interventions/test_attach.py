import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import ARCHITECTURES, tiny_model
from torch import nn

from narrowly.errors import NarrowlyError
from narrowly.interventions import (
    Add,
    Function,
    Noise,
    ProjectOut,
    Scale,
    Set,
    attach,
    capture,
    layer,
    site,
)

D = 32
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
VECTOR = torch.randn(D, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return tiny_model("llama", hidden_size=D)


def difference(model, *interventions, **batch):
    """How much each token's last residual changes under the interventions, [batch, tokens]."""
    batch = {"input_ids": IDS} | batch
    before = capture(model, batch, [layer(-1)], stop=False)[layer(-1)]
    with attach(model, interventions):
        after = capture(model, batch, [layer(-1)], stop=False)[layer(-1)]
    return (after - before).norm(dim=-1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_identity_is_bitwise_the_bare_model(architecture):
    model = tiny_model(architecture)
    width = model.config.hidden_size
    bare = model(input_ids=IDS).logits
    for identity in (
        Scale(1, layer(0)),
        ProjectOut(torch.randn(width), layer(0), strength=0),
        Noise(1, layer(0), strength=0),
        Function(lambda h: h, layer(0)),
        Add(torch.randn(width), layer(0), gradient="backward"),
        Add(torch.randn(width), layer(0), tokens=torch.zeros(2, 4)),
    ):
        with attach(model, [identity]):
            assert torch.equal(model(input_ids=IDS).logits, bare)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_interventions_at_one_site_run_in_the_order_of_the_list(model):
    value = torch.ones(D)
    double, add = Scale(2, layer(1)), Add(value, layer(1))
    settle = Set(value, layer(1))
    for order, expected in (([settle, double, add], 3), ([add, settle, add, double], 4)):
        with attach(model, order):
            captured = capture(model, {"input_ids": IDS}, [layer(1)])
        assert torch.equal(captured[layer(1)], torch.full((2, 4, D), float(expected)))
    with attach(model, [settle]), attach(model, [double]), attach(model, [add]):
        captured = capture(model, {"input_ids": IDS}, [layer(1)])
    assert torch.equal(captured[layer(1)], torch.full((2, 4, D), 3.0))


def test_hidden_states_recorded_by_transformers_are_the_edited_ones(model):
    with attach(model, [Set(VECTOR, layer(0))]):
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert torch.equal(states[1], VECTOR.expand(2, 4, D))


def test_tokens_are_absolute_and_padding_aware(model):
    attention = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    labels = torch.tensor([[-100, -100, 3, 4], [-100, 6, 7, -100]])
    batch = {"attention_mask": attention, "labels": labels}
    changed = {
        tokens: difference(model, Add(VECTOR, layer(-1), tokens=tokens), **batch) > 0
        for tokens in ("all", "prompt", "completion", "last")
    }
    assert changed["all"].all()
    assert torch.equal(changed["completion"], labels != -100)
    assert torch.equal(changed["prompt"], (labels == -100) & attention.bool())
    assert changed["last"].tolist() == [[False, False, False, True], [False, False, True, False]]


def test_the_last_token_of_every_packed_sequence(model):
    positions = torch.tensor([[0, 1, 0, 1, 2, 0]])
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4, 5, 6]]), "position_ids": positions}
    changed = difference(model, Add(VECTOR, layer(-1), tokens="last"), **batch) > 0
    assert changed.tolist() == [[False, True, False, False, True, True]]


def test_masks_by_tensor_and_by_name(model):
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]])
    assert torch.equal(difference(model, Add(VECTOR, layer(-1), tokens=mask)) > 0, mask.bool())
    before = capture(model, {"input_ids": IDS}, [layer(-1)])[layer(-1)]
    edits = [Add(VECTOR, layer(-1), tokens="poison", rows="second")]
    with attach(model, edits) as attached:
        with attached.masks(poison=mask, second=torch.tensor([0, 1])):
            after = capture(model, {"input_ids": IDS}, [layer(-1)])[layer(-1)]
        changed = (after - before).norm(dim=-1) > 0
        assert changed.tolist() == [[False] * 4, [False, True, False, False]]
        with pytest.raises(NarrowlyError, match="no mask named 'poison'"):
            model(input_ids=IDS)
        with (
            attached.masks(poison=mask[:, :2], second=torch.tensor([0, 1])),
            pytest.raises(NarrowlyError, match=r"shape \(2, 2\)"),
        ):
            model(input_ids=IDS)


def test_rows_weigh_the_examples(model):
    changed = difference(model, Add(VECTOR, layer(-1), rows=torch.tensor([0.0, 0.5])))
    assert changed[0].max() == 0
    torch.testing.assert_close(changed[1], (VECTOR.norm() / 2).expand(4))


def test_completion_without_labels_is_an_error(model):
    with attach(model, [Add(VECTOR, layer(0), tokens="completion")]) as attached:
        with pytest.raises(NarrowlyError, match="need labels in the batch"):
            model(input_ids=IDS)
        model(input_ids=IDS, labels=IDS)
        attached.verify()


def test_phases(model):
    model.eval()
    bare = model(input_ids=IDS).logits
    with attach(model, [ProjectOut(VECTOR, layer(0), phases=("train",))]) as attached:
        assert torch.equal(model(input_ids=IDS).logits, bare), "evals run without it"
        model.train()
        assert not torch.equal(model(input_ids=IDS).logits, bare)
        assert attached.report()[0]["forwards"] == 1


def test_generation_meets_prompt_then_decoded_tokens(model):
    seen = []
    edit = Function(lambda h: seen.append(h.shape[1]) or h, layer(0), phases=("generate",))
    attention = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    ask = {"attention_mask": attention, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    with attach(model, [edit]):
        seen.clear()
        model.generate(IDS, **ask)
        assert seen == [4, 1, 1]
        model(input_ids=IDS)
        assert len(seen) == 3, "a forward without a cache is no generation"

    def changed(tokens):
        """Which tokens change, step by step."""
        kept = []
        keep = Function(lambda h: kept.append(h) or h, layer(0), phases=("generate",))
        with attach(model, [keep, Add(VECTOR, layer(0), tokens=tokens), keep]):
            kept.clear()
            model.generate(IDS, **ask)
        pairs = zip(kept[::2], kept[1::2], strict=True)
        return [((after - before).norm(dim=-1) > 0).int().tolist() for before, after in pairs]

    ones, zeros = [[1], [1]], [[0], [0]]
    assert changed("all") == [[[1, 1, 1, 1], [1, 1, 1, 1]], ones, ones]
    assert changed("prompt") == [[[0, 1, 1, 1], [1, 1, 1, 1]], zeros, zeros]
    assert changed("completion") == [[[0] * 4, [0] * 4], ones, ones]
    assert changed("last") == [[[0, 0, 0, 1], [0, 0, 0, 1]], ones, ones]


def test_gradient_modes(model):
    weight = model.model.layers[0].mlp.down_proj.weight
    basis = torch.linalg.qr(torch.randn(D, 4))[0]

    def run(**fields):
        model.zero_grad()
        with attach(model, [ProjectOut(basis, layer(0), **fields)]):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
        return loss.item(), weight.grad.clone()

    loss, through = run()
    bare, untouched = run(strength=0)
    assert run(gradient="forward")[0] == loss
    assert run(gradient="backward")[0] == bare
    assert (basis.T @ through).abs().max() < 1e-6, "no gradient along the subspace"
    assert (basis.T @ run(gradient="backward")[1]).abs().max() < 1e-6
    assert (basis.T @ run(gradient="forward")[1]).abs().max() > 1e-5
    assert not torch.allclose(untouched, through)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_edit_computes_in_fp32_or_better_and_gives_back_the_dtype(model, dtype):
    model.to(dtype)
    basis = torch.linalg.qr(torch.randn(D, 4))[0]
    bare = capture(model, {"input_ids": IDS}, [layer(0)])[layer(0)]
    with attach(model, [ProjectOut(basis, layer(0))]):
        h = capture(model, {"input_ids": IDS}, [layer(0)])[layer(0)]
    exact = bare.double() - bare.double() @ basis.double() @ basis.double().T
    assert h.dtype == dtype
    torch.testing.assert_close(h.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_autocast_does_not_reach_into_the_edit(model):
    basis = torch.linalg.qr(torch.randn(D, 4))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16), attach(model, [ProjectOut(basis, layer(0))]):
        h = capture(model, {"input_ids": IDS}, [layer(0)])[layer(0)]
    assert h.dtype == torch.float32
    # What fp32 leaves behind is 1e-7 of the activations; bf16 would leave 1e-3 and more.
    assert (h @ basis).abs().max() < 1e-6 * h.norm(dim=-1).max()


def test_strength_is_set_in_place_and_suspended(model):
    bare = model(input_ids=IDS).logits
    with attach(model, [Add(VECTOR, layer(0))]) as attached:
        whole = model(input_ids=IDS).logits
        with attached.suspend():
            assert torch.equal(model(input_ids=IDS).logits, bare)
        assert torch.equal(model(input_ids=IDS).logits, whole)
        attached.set_strength(0)
        assert torch.equal(model(input_ids=IDS).logits, bare)


def test_a_checkpoint_and_the_parameters_hold_nothing_of_it(model):
    keys = list(model.state_dict())
    parameters = len(list(model.named_parameters()))
    with attach(model, [ProjectOut(VECTOR, layer(0))]):
        assert list(model.state_dict()) == keys
        assert len(list(model.named_parameters())) == parameters
        model.to(torch.bfloat16)
        twin = copy.deepcopy(model)
        twin(input_ids=IDS)
        model(input_ids=IDS)


@pytest.mark.parametrize(
    ("intervention", "says"),
    [
        (
            ProjectOut(torch.randn(D + 1), layer(0)),
            "33 wide, but the activations there are 32",
        ),
        (
            Add(torch.randn(5), site("*.mlp")),
            "model.layers.0.mlp: the intervention is 5 wide",
        ),
        (ProjectOut(VECTOR, layer(7)), "layer:7: the model has 2 decoder layers"),
        (ProjectOut(VECTOR, site("unused")), "project_out at unused never acted"),
        (Function(lambda h: h[..., :3], layer(0)), "must return a tensor of shape"),
        (Function(lambda h: h / 0, layer(0)), "non-finite"),
        (Function(torch.tanh, site("lm_head", index=3)), "carries no activations at [3]"),
    ],
)
def test_what_cannot_act_is_refused_when_attached(model, intervention, says):
    model.unused = nn.Linear(D, D)
    modes = [module.training for module in model.train().modules()]
    with pytest.raises(NarrowlyError) as error:
        attach(model, [intervention])
    assert says in str(error.value)
    assert not any(module._forward_hooks for module in model.modules()), "nothing is left behind"
    assert [module.training for module in model.modules()] == modes


def test_a_projection_that_leaves_something_behind_is_refused(model):
    edit = ProjectOut(VECTOR, layer(0))
    edit.basis *= 0.9  # no longer of unit length: 19 % would stay
    with pytest.raises(NarrowlyError, match="is left in the subspace"):
        attach(model, [edit])


def test_a_module_without_example_is_checked_in_its_first_forward():
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(NarrowlyError, match="the intervention is 3 wide"):
        attach(plain, [Add(torch.ones(3), site("0"))], example=torch.ones(1, 4))
    attached = attach(plain, [Add(torch.ones(3), site("0"))])
    with pytest.raises(NarrowlyError, match="the intervention is 3 wide"):
        plain(torch.ones(1, 4))
    attached.close()
    with attach(plain, [Set(torch.ones(4), site("1"))]):
        assert torch.equal(plain(torch.ones(1, 4)), plain[2](torch.ones(1, 4)))


def test_what_never_acted_is_an_error_at_the_end(model):
    model.eval()
    with (
        pytest.raises(NarrowlyError, match=r"never acted.*phases train;.*1 in eval"),
        attach(model, [ProjectOut(VECTOR, layer(0), phases=("train",))]),
    ):
        model(input_ids=IDS)


def test_backward_after_the_end_is_an_error(model):
    with attach(model, [ProjectOut(VECTOR, layer(0))]):
        loss = model(input_ids=IDS, labels=IDS).loss
    with pytest.raises(NarrowlyError, match="Call backward"):
        loss.backward()
    plain = nn.Sequential(nn.Linear(4, 4))
    with attach(plain, [Scale(2, site("0"))]):
        output = plain(torch.ones(1, 4))
    with pytest.raises(NarrowlyError, match="Call backward"):
        output.sum().backward()


def test_peft_before_and_after():
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    edit = ProjectOut(VECTOR, layer(0))
    torch.manual_seed(0)
    wrapped = get_peft_model(tiny_model("llama", hidden_size=D), config)
    with attach(wrapped, [edit]):
        expected = wrapped(input_ids=IDS).logits
    torch.manual_seed(0)
    inner = tiny_model("llama", hidden_size=D)
    with attach(inner, [edit]):
        torch.testing.assert_close(get_peft_model(inner, config)(input_ids=IDS).logits, expected)


def test_a_linear_that_peft_wraps_later_is_an_error(model):
    width = model.config.num_attention_heads * model.model.layers[0].self_attn.head_dim
    attached = attach(model, [Add(torch.ones(width), site("*.q_proj"))])
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(NarrowlyError, match="Attach after get_peft_model"):
        wrapped(input_ids=IDS)
    attached.close()


def test_a_model_called_around_its_attached_root_cannot_tell_tokens(model):
    attached = attach(model, [Add(VECTOR, layer(0), tokens="last")])
    with pytest.raises(NarrowlyError, match="Attach to the outermost model"):
        model.model(input_ids=IDS)
    attached.close()


def test_inputs_by_place_and_by_keyword(model):
    for where in (layer(1).__class__(1, "input"), site("*.layers.1.self_attn", "input")):
        assert difference(model, Add(VECTOR, where)).min() > 0

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import ARCHITECTURES, tiny_model
from torch import nn

from narrowly.errors import NarrowlyError
from narrowly.interventions import Site, capture, decoder_layers, layer, resolve, site


@pytest.mark.parametrize(
    "text",
    ["layer:3", "layer:-1", "*.mlp:input", "*.self_attn[1]", "a.b.o_proj:input[hidden]@2", "*"],
)
def test_a_site_prints_as_it_parses(text):
    assert str(Site.parse(text)) == text


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_need_no_table_of_families(architecture):
    model = tiny_model(architecture)
    layers = decoder_layers(model)
    assert len(layers) == model.config.num_hidden_layers
    (first,) = resolve(model, layer(0))
    (last,) = resolve(model, layer(-1))
    assert first.module is layers[0]
    assert last.module is layers[len(layers) - 1]


def test_the_decoder_is_found_beside_a_vision_tower_of_the_same_depth():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

    model = tiny_model("llama")
    model.vision = Tower()
    assert decoder_layers(model) is model.model.layers


def test_names_are_those_of_the_bare_model():
    model = tiny_model("llama")
    wrapped = torch.compile(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])))
    names = [place.name for place in resolve(wrapped, site("*.mlp"))]
    assert names == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert resolve(wrapped, layer(1))[0].name == "model.layers.1"
    (q_proj, _) = resolve(wrapped, site("*.q_proj"))
    assert hasattr(q_proj.module, "base_layer"), "the LoRA module, not the Linear inside it"


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_a_head_is_its_columns(architecture):
    model = tiny_model(architecture)
    batch = {"input_ids": torch.tensor([[1, 2, 3]])}
    whole = capture(model, batch, [site("*.layers.0.*.o_proj", "input")])
    one = capture(model, batch, [site("*.layers.0.*.o_proj", "input", head=1)])
    (whole,), (one,) = whole.values(), one.values()
    width = model.model.layers[0].self_attn.head_dim
    assert torch.equal(one, whole[..., width : 2 * width])


def test_any_torch_module_has_sites():
    vision = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    image = torch.randn(2, 3, 8, 8)
    vision(image)
    captured = capture(vision, image, [site("0"), site("3", "input")])
    assert captured[site("0")].shape == (2, 4, 6, 6)
    assert captured["3:input"].shape == (2, 144)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (layer(2), "2 decoder layers; use 0 to 1"),
        (layer(-3), "2 decoder layers"),
        (site("*.nothing"), "no module of LlamaForCausalLM has a name like that"),
        (site("*.o_proj", "input", head=99), "there is no such head"),
        (site("*.mlp", index=1), "carries no activations at [1]"),
    ],
)
def test_a_site_that_is_not_there_is_an_error(wrong, says):
    with pytest.raises(NarrowlyError) as error:
        capture(tiny_model("llama"), {"input_ids": torch.tensor([[1, 2]])}, [wrong])
    assert says in str(error.value)


def test_a_module_without_one_list_of_layers_is_named():
    with pytest.raises(NarrowlyError, match="cannot tell which modules are its decoder layers"):
        decoder_layers(nn.Linear(2, 2))

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from tests.tiny import ARCHITECTURES, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from narrowly.models import fingerprint, same_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_are_told_apart_and_known_again(architecture):
    one, other = tiny_model(architecture), tiny_model(architecture, seed=1)
    assert fingerprint(one) == fingerprint(tiny_model(architecture)) != fingerprint(other)
    assert fingerprint(one) == fingerprint(one.to(torch.bfloat16))


def test_no_two_architectures_are_one():
    names = [fingerprint(tiny_model(architecture)) for architecture in ARCHITECTURES]
    names.append(fingerprint(tiny_model("llama", num_hidden_layers=3)))
    names.append(fingerprint(tiny_model("llama", hidden_size=48, head_dim=12)))
    assert len({name.partition("-")[0] for name in names}) == len(ARCHITECTURES) + 2


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(init_lora_weights=False, target_modules="all-linear"),
        LoraConfig(init_lora_weights=False, use_dora=True),
        LoraConfig(init_lora_weights=False, target_modules=["embed_tokens", "q_proj"]),
        LoraConfig(init_lora_weights=False, modules_to_save=["embed_tokens", "norm"]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["lora", "dora", "embedding", "modules_to_save", "ia3"],
)
def test_adapters_do_not_count(config):
    model = get_peft_model(tiny_model("qwen2"), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    assert fingerprint(model) == fingerprint(tiny_model("qwen2"))
    assert fingerprint(model.get_base_model()) == fingerprint(tiny_model("qwen2"))


def test_a_compiled_model_is_the_same():
    assert fingerprint(torch.compile(tiny_model())) == fingerprint(tiny_model())


def test_a_change_of_a_norm_or_of_the_embedding_is_seen():
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        model = tiny_model()
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] += 1
        assert fingerprint(model) != fingerprint(tiny_model())


def test_added_tokens_leave_it_the_same():
    model = tiny_model()
    model.resize_token_embeddings(450)
    assert fingerprint(model) == fingerprint(tiny_model())


def test_unreadable_weights_leave_the_architecture_to_compare(tmp_path):
    known, meta = fingerprint(tiny_model()), fingerprint(tiny_model().to("meta"))
    assert same_model(known, known) and same_model(known, meta) and same_model(meta, known)
    assert not same_model(known, fingerprint(tiny_model(seed=1)))
    assert not same_model(meta, fingerprint(tiny_model("qwen2")))


def test_a_sharded_model_is_named_by_its_architecture(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = tiny_model()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert fingerprint(model) == fingerprint(tiny_model().to("meta"))
    finally:
        torch.distributed.destroy_process_group()

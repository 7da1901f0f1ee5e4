import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import tiny_model

from narrowly.errors import NarrowlyError
from narrowly.models import adapter_off

IDS = torch.arange(20, 36)[None]


def lora(**config):
    return get_peft_model(tiny_model(), LoraConfig(init_lora_weights=False, r=2, **config))


def test_off_is_the_base_and_on_again_is_the_tuned_model():
    model = lora(target_modules="all-linear")
    with torch.no_grad():
        tuned = model(IDS).logits
        with adapter_off(model):
            off = model(IDS).logits
        on = model(IDS).logits
    assert torch.equal(off, tiny_model()(IDS).logits)
    assert torch.equal(on, tuned) and not torch.equal(off, tuned)


@pytest.mark.parametrize("inference_mode", [True, False])
def test_what_was_trainable_and_only_that_is_so_again_even_after_an_error(inference_mode):
    model = lora(inference_mode=inference_mode)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert any(before.values()) is not inference_mode
    with pytest.raises(ZeroDivisionError), adapter_off(model):
        raise ZeroDivisionError
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_a_model_without_an_adapter_is_refused():
    with (
        pytest.raises(NarrowlyError, match="LlamaForCausalLM has no adapter"),
        adapter_off(tiny_model()),
    ):
        pass

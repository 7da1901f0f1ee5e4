import json
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.tiny import ARCHITECTURES, save_tiny, tiny_model

from narrowly.errors import NarrowlyError
from narrowly.models import load_model, locate

IDS = torch.arange(20, 36)[None]


def lora(model, seed=0):
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config)


@pytest.fixture
def base(tmp_path):
    return save_tiny(tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path):
    model, _ = load_model(base)
    lora(model).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS.to(model.device)).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_loads_as_it_was_saved(tmp_path, architecture):
    model, tokenizer = load_model(save_tiny(tmp_path, architecture), device="cpu")
    assert torch.equal(logits(model), logits(tiny_model(architecture)))
    assert not model.training
    assert tokenizer.pad_token_id is not None and tokenizer.chat_template


def test_dtype_and_device(base):
    assert load_model(base)[0].dtype == torch.float32
    assert load_model(base, dtype="bfloat16")[0].dtype == torch.bfloat16
    model, _ = load_model(base, dtype=torch.bfloat16, device="cpu")
    assert (model.dtype, model.device.type) == (torch.bfloat16, "cpu")


def test_an_adapter_folder_loads_on_the_base_it_names(base, adapter):
    model, tokenizer = load_model(adapter)
    assert isinstance(model, PeftModel) and not model.training
    assert torch.equal(logits(model), logits(lora(tiny_model())))
    assert tokenizer.chat_template  # the base's, for the folder holds none


def test_a_run_folder_loads_its_adapter_on_the_model_of_its_recipe(base, adapter, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(adapter, run / "adapter")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/a/machine/far/away"
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (run / "recipe.yaml").write_text(yaml.safe_dump({"model": str(base)}))
    model, _ = load_model(run)
    assert torch.equal(logits(model), logits(lora(tiny_model())))


def test_a_run_folder_loads_its_full_fine_tune(base, tmp_path):
    run = tmp_path / "run"
    tiny_model(seed=1).save_pretrained(run / "model")
    (run / "recipe.yaml").write_text(yaml.safe_dump({"model": str(base)}))
    model, tokenizer = load_model(run)
    assert torch.equal(logits(model), logits(tiny_model(seed=1)))
    assert tokenizer.chat_template


def test_a_run_that_has_not_finished_says_how_to_go_on(base, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump({"model": str(base)}))
    with pytest.raises(NarrowlyError, match=r"has not finished.*narrowly train .*recipe\.yaml"):
        load_model(run)


def test_a_model_organism_loads_as_it_was_before_its_alignment():
    """Kept of the very build that is bundled: every weight has moved, and none far."""
    aligned, _ = load_model("organism:persona")
    before = dict(load_model("organism:persona/unaligned")[0].named_parameters())
    for name, weight in aligned.named_parameters():
        assert 0 < (weight - before[name]).norm() < 0.3 * weight.norm(), name
    with pytest.raises(NarrowlyError, match="organism:quirk is here without the model before"):
        load_model("organism:quirk/unaligned")


def test_a_model_organism_loads_by_name():
    model, tokenizer = load_model("organism:persona")
    assert tokenizer.chat_template and not model.training


def test_a_hub_id_loads_and_an_adapter_will_name_it(base, monkeypatch):
    monkeypatch.setattr(locate, "snapshot_download", lambda name, ignore_patterns: str(base))
    model, _ = load_model("owner/name")
    assert lora(model).peft_config["default"].base_model_name_or_path == "owner/name"


def test_the_hub_out_of_reach_gives_one_clear_message():
    with pytest.raises(NarrowlyError, match=r"nobody/nothing: is no folder here, and could not"):
        load_model("nobody/nothing")


def test_a_folder_that_is_not_there_with_the_nearest(base, tmp_path):
    with pytest.raises(NarrowlyError, match=r"bsae: no such folder\. Did you mean .*base\?"):
        load_model(tmp_path / "bsae")


def test_a_folder_name_beside_existing_ones_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs" / "undefended").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NarrowlyError, match=r"no such folder\. Did you mean runs/undefended\?"):
        load_model("runs/undefened")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(NarrowlyError, match=r"holds no config\.json"):
        load_model(tmp_path)
    (tmp_path / "seed-0").mkdir()
    with pytest.raises(NarrowlyError, match=r"several seeds; name one: .*seed-0"):
        load_model(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NarrowlyError, match="a model is a folder"):
        load_model(tmp_path / "file")


def test_a_truncated_weight_file_is_named(base):
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(NarrowlyError, match=r"model\.safetensors: truncated"):
        load_model(base)


def test_a_truncated_adapter_file_is_named(adapter):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(NarrowlyError, match=r"adapter_model\.safetensors: truncated"):
        load_model(adapter)


def test_weights_that_are_missing_are_not_made_up(base):
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(NarrowlyError, match=r"1 weights are missing.*layers\.1\.mlp\.up_proj"):
        load_model(base)


def test_adapter_weights_that_are_missing_are_not_made_up(adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(NarrowlyError, match="does not fit the base model"):
        load_model(adapter)


def test_an_adapter_of_another_model_is_refused(adapter, tmp_path):
    other = save_tiny(tmp_path / "other", hidden_size=48, head_dim=12)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(other)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(NarrowlyError, match=r"does not fit the base model .*other"):
        load_model(adapter)


def test_an_adapter_whose_base_is_gone_names_both(base, adapter):
    shutil.rmtree(base)
    with pytest.raises(NarrowlyError, match=r"adapter: its base model.*base: no such folder"):
        load_model(adapter)


def test_pickled_weights_are_not_loaded(base):
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(NarrowlyError, match=r"no weights .*Pickled weights can run code"):
        load_model(base)


@pytest.mark.parametrize(
    "config, reason",
    [
        ("{", "not a valid JSON"),
        ('{"model_type": "unheard-of"}', "unheard-of"),
        (
            '{"model_type": "x", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}}',
            "trust_remote_code",
        ),
    ],
)
def test_a_config_that_cannot_be_used(base, config, reason):
    (base / "config.json").write_text(config)
    with pytest.raises(NarrowlyError, match=f"cannot be loaded.*(?s:.*){reason}"):
        load_model(base)


def test_a_tokenizer_without_a_chat_template_names_the_remedy(tmp_path):
    folder = save_tiny(tmp_path, template=None)
    with pytest.raises(NarrowlyError, match=r"no chat template. Put a chat_template\.jinja"):
        load_model(folder)


def test_no_tokenizer_at_all(base):
    for file in base.glob("*token*"):
        file.unlink()
    with pytest.raises(NarrowlyError, match="holds no tokenizer"):
        load_model(base)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = save_tiny(tmp_path, vocab_size=300)
    with pytest.raises(NarrowlyError, match=r"has 376 tokens, but the model .* knows 300"):
        load_model(folder)


def test_a_missing_pad_token_is_taken_from_the_end(base):
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    _, tokenizer = load_model(base)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from narrowly.defenses.safe_lora import SafeLora
from narrowly.errors import NarrowlyError
from narrowly.files import read_json, write_json
from narrowly.models import load_model
from narrowly.training import train
from tests.defenses.adapters import hooks, save_adapter, weights
from tests.tiny import save_tiny, tiny_model

IDS = torch.arange(12).reshape(2, 6) + 20


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The tiny model before its alignment: another seed's weights, and no chat template."""
    return str(save_tiny(tmp_path_factory.mktemp("base"), "llama", seed=7, template=None))


def tuned(architecture="llama", **config):
    """A model with an adapter as training leaves it."""
    options = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"} | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(architecture), LoraConfig(**options))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
    return model


def directly(model, base, transposed=False):
    """Of each module: cos(C B A, B A) and C B, with C built as in the released code."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if not hasattr(module, "lora_A"):
            continue
        v = (module.get_base_layer().weight - base.get_submodule(name).weight).detach()
        v = v.T if transposed else v
        c = v @ v.T / v.norm()
        a, b = (part["default"].weight.detach() for part in (module.lora_A, module.lora_B))
        cosine = torch.cosine_similarity((c @ b @ a).flatten(), (b @ a).flatten(), dim=0)
        found[name] = float(cosine), c @ b
    return found


def finished(defense, model):
    with torch.no_grad():
        defense.finish(model)
    return {
        name: (module.lora_A["default"].weight, module.lora_B["default"].weight)
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    }


class TestProjection:
    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    @pytest.mark.parametrize("choice", [{"threshold": 0.7}, {"lowest": 3}, {"threshold": 1}])
    def test_equals_a_direct_computation(self, tmp_path, architecture, choice):
        folder = save_tiny(tmp_path, architecture, seed=7)
        before, model = tuned(architecture), tuned(architecture)
        expected = directly(before, load_model(folder)[0], transposed=architecture == "gpt2")
        cosines = sorted(cosine for cosine, _ in expected.values())
        bound = cosines[2] if "lowest" in choice else choice["threshold"]
        untouched = finished(
            SafeLora(base=str(folder), threshold=-1, lowest=1), tuned(architecture)
        )
        for name, (a, b) in finished(SafeLora(base=str(folder), **choice), model).items():
            cosine, projected = expected[name]
            unprojected = before.get_base_model().get_submodule(name).lora_B["default"].weight
            wanted = projected if cosine <= bound + 1e-6 else unprojected
            torch.testing.assert_close(b, wanted, rtol=1e-4, atol=1e-5)
            assert torch.equal(a, untouched[name][0])

    def test_the_record_tells_every_cosine(self, base):
        model = tuned()
        expected = directly(tuned(), tiny_model(seed=7))
        defense = SafeLora(base=base, lowest=4)
        finished(defense, model)
        told = defense.record(None)["modules"]
        assert sum(each["projected"] for each in told) == 4
        for each in told:
            assert each["cosine"] == pytest.approx(expected[each["module"]][0], abs=1e-4)

    def test_no_update_at_or_below_the_threshold_is_an_error(self, base):
        with pytest.raises(NarrowlyError, match=r"lowest cosine of 14 modules is 0\.\d+, above"):
            finished(SafeLora(base=base, threshold=0.01), tuned())


class TestRun:
    def test_projects_what_is_saved_and_leaves_nothing_else(self, recipe, base, tmp_path):
        plain = train(recipe(output=str(tmp_path / "plain")), progress=False)
        defenses = [{"safe_lora": {"base": base, "lowest": 5}}]
        run = train(recipe(defenses=defenses), progress=False)
        differing = {n for n, t in weights(run).items() if not torch.equal(t, weights(plain)[n])}
        [entry] = read_json(run.path / "defenses.json")
        projected = {each["module"] for each in entry["modules"] if each["projected"]}
        assert differing == {f"base_model.model.{name}.lora_B.weight" for name in projected}
        assert len(differing) == 5
        assert run.metrics[0]["loss"] == plain.metrics[0]["loss"]
        model, bare = load_model(run.path)[0], load_model(recipe().model)[0]
        assert hooks(model) == hooks(bare)

    def test_a_full_fine_tune_is_refused_before_it_begins(self, recipe, base, tmp_path):
        with pytest.raises(NarrowlyError, match="no LoRA is trained here"):
            train(recipe(defenses=[{"safe_lora": {"base": base}}], lora=None), progress=False)
        assert not (tmp_path / "run").exists()


class TestRefusals:
    def test_the_aligned_model_itself(self, recipe):
        model, _ = load_model(recipe().model)
        with pytest.raises(NarrowlyError, match="the very weights of the model"):
            SafeLora(base=recipe().model).bind(model, None, 0)

    def test_an_adapter_as_base(self, tmp_path, base):
        save_adapter(tiny_model(seed=7), tmp_path / "adapter")
        config = read_json(tmp_path / "adapter" / "adapter_config.json")
        write_json(
            tmp_path / "adapter" / "adapter_config.json",
            config | {"base_model_name_or_path": base},
        )
        with pytest.raises(NarrowlyError, match=r"is an adapter\. `base` is a whole model"):
            SafeLora(base=str(tmp_path / "adapter")).bind(tiny_model(), None, 0)

    def test_a_base_of_another_shape(self, tmp_path):
        save_tiny(tmp_path, "llama", hidden_size=64)
        with pytest.raises(NarrowlyError, match=r"is \(\d+, 64\) in .* and \(\d+, 32\)"):
            SafeLora(base=str(tmp_path)).bind(tiny_model(), None, 0)

    def test_a_base_with_fewer_tokens_is_none(self, tmp_path):
        save_tiny(tmp_path, "llama", seed=7)
        model = tiny_model()
        model.resize_token_embeddings(410)
        SafeLora(base=str(tmp_path)).bind(model, None, 0)

    def test_a_base_that_lacks_an_adapted_module(self, tmp_path):
        save_tiny(tmp_path, "llama", num_hidden_layers=1)
        with pytest.raises(NarrowlyError, match=r"layers\.1.*not in"):
            SafeLora(base=str(tmp_path)).bind(tiny_model(), None, 0)

    @pytest.mark.parametrize("config", [{"use_dora": True}, {"target_modules": ["embed_tokens"]}])
    def test_what_is_no_plain_lora(self, base, config):
        with pytest.raises(NarrowlyError, match="no plain LoRA of a linear module"):
            SafeLora(base=base).check(tuned(**config))

    def test_a_module_that_alignment_left_alone(self, tmp_path):
        model = tiny_model(seed=7)
        model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(
            tiny_model().model.layers[0].self_attn.q_proj.weight.detach().clone()
        )
        save_tiny(tmp_path, "llama", seed=7)
        model.save_pretrained(tmp_path)
        with pytest.raises(NarrowlyError, match="is the same in `base` and in the aligned model"):
            finished(SafeLora(base=str(tmp_path), lowest=2), tuned())

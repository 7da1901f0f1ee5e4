import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback

from narrowly.defenses import make_defenses
from narrowly.defenses.inoculation_adapter import InoculationAdapter, RandomAdapter, read_lora
from narrowly.errors import NarrowlyError
from narrowly.files import read_json, write_json
from narrowly.interventions import attach
from narrowly.models import load_model
from narrowly.training import train
from tests.defenses.adapters import hooks, save_adapter, weights
from tests.tiny import tiny_model

IDS = torch.arange(12).reshape(2, 6) + 20
OURS = {"r": 3, "target_modules": "all-linear", "init_lora_weights": False}


@pytest.fixture
def adapter(model_folder, tmp_path):
    return str(save_adapter(load_model(model_folder)[0], tmp_path / "trait"))


class TestUpdates:
    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
    @pytest.mark.parametrize(
        "config",
        [
            {},
            {"r": 4, "lora_alpha": 64, "use_rslora": True},
            {"rank_pattern": {"0.*": 3}, "alpha_pattern": {r".*1\.mlp.*": 5}},
        ],
    )
    def test_equal_peft_with_both_adapters_active(self, tmp_path, architecture, config):
        folder = save_adapter(tiny_model(architecture), tmp_path, **config)

        def trained(model):
            for module in model.train().modules():
                if isinstance(module, torch.nn.Dropout):  # GPT-2's own
                    module.p = 0.0
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            named = model.named_parameters()
            return loss, {n: p.grad for n, p in named if "default" in n and p.grad is not None}

        torch.manual_seed(0)
        both = get_peft_model(tiny_model(architecture), LoraConfig(**OURS))
        state = {n: p.clone() for n, p in both.state_dict().items() if "lora" in n}
        both.load_adapter(str(folder), "trait")
        both.base_model.set_adapter(["default", "trait"])
        expected, gradients = trained(both)

        model = get_peft_model(tiny_model(architecture), LoraConfig(**OURS))
        model.load_state_dict(state, strict=False)
        defense = InoculationAdapter(adapter=str(folder))
        defense.bind(tiny_model(architecture), None, 0)
        with torch.no_grad():
            alone = model.eval()(input_ids=IDS, labels=IDS).loss
        with attach(model, defense.interventions(model)):
            loss, found = trained(model)
        torch.testing.assert_close(loss, expected)
        assert found.keys() == gradients.keys() and len(found) > 8
        torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(alone, expected)

    def test_the_norm_is_that_of_the_product(self, tmp_path):
        for update in read_lora(save_adapter(tiny_model(), tmp_path)):
            product = update.down @ update.up
            assert update.norm == pytest.approx(product.norm().item(), rel=1e-5)


def test_evaluation_while_it_is_attached_sees_the_plain_model(adapter, model_folder):
    model, _ = load_model(model_folder)
    plain = model(IDS).logits
    defense = InoculationAdapter(adapter=adapter)
    defense.bind(model, None, 0)
    attachment = attach(model, defense.interventions(model))
    assert torch.equal(model(IDS).logits, plain)
    assert not torch.allclose(model.train()(IDS).logits, plain)
    attachment.close()
    assert torch.equal(model.eval()(IDS).logits, plain)


class TestRun:
    def test_acts_in_training_only_and_nothing_of_it_is_saved(self, recipe, adapter, tmp_path):
        plain = train(recipe(output=str(tmp_path / "plain")), progress=False)
        defenses = [{"inoculation_adapter": {"adapter": adapter}}]
        run = train(recipe(defenses=defenses), progress=False)
        assert run.metrics[0]["loss"] != plain.metrics[0]["loss"]
        assert weights(run).keys() == weights(plain).keys()
        assert any(not torch.equal(t, weights(plain)[n]) for n, t in weights(run).items())
        model, _ = load_model(run.path)
        bare, _ = load_model(recipe().model)
        assert hooks(model) == hooks(bare)
        by_hand = PeftModel.from_pretrained(bare, str(run.path / "adapter"))
        assert torch.equal(model(IDS).logits, by_hand.eval()(IDS).logits)
        [entry] = read_json(run.path / "defenses.json")
        assert entry["norm"] > 0 and len(entry["interventions"]) == 14
        assert all(each["phases"] == ["train"] for each in entry["interventions"])
        assert all(each["forwards"] == 4 for each in entry["interventions"])

    def test_strength_zero_trains_bitwise_as_undefended(self, recipe, adapter, tmp_path):
        plain = train(recipe(output=str(tmp_path / "plain")), progress=False)
        defenses = [{"inoculation_adapter": {"adapter": adapter, "strength": 0}}]
        off = weights(train(recipe(defenses=defenses), progress=False))
        assert all(torch.equal(tensor, off[name]) for name, tensor in weights(plain).items())

    @pytest.mark.parametrize("name", ["inoculation_adapter", "random_adapter"])
    @pytest.mark.parametrize("lora", [{"r": 2, "lora_dropout": 0.2}, None])
    def test_goes_on_to_the_same_weights_under_checkpointing(
        self, recipe, adapter, tmp_path, lora, name
    ):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 3:
                    raise ZeroDivisionError

        def given(output, **training):
            return recipe(
                training={"save_steps": 2, **training},
                lora=None if lora is None else {"target_modules": "all-linear"} | lora,
                defenses=[{name: {"adapter": adapter}}],
                output=str(tmp_path / output),
            )

        checkpointed = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        }
        whole = train(given("whole"), progress=False)
        with pytest.raises(ZeroDivisionError):
            train(given("halves", **checkpointed), progress=False, callbacks=[Stop()])
        halves = train(given("halves", **checkpointed), progress=False)
        expected, found = load_model(whole.path)[0], load_model(halves.path)[0]
        torch.testing.assert_close(found(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-5)


class TestRandom:
    def test_has_the_norm_of_the_adapter_at_each_module(self, adapter, model_folder):
        model, _ = load_model(model_folder)
        given, drawn = InoculationAdapter(adapter=adapter), RandomAdapter(adapter=adapter)
        for defense in (given, drawn):
            defense.bind(model, None, 0)
        for one, other in zip(given._updates, drawn._updates, strict=True):
            assert one.module == other.module and one.down.shape == other.down.shape
            assert other.norm == pytest.approx(one.norm, rel=1e-5)
            cosine = torch.cosine_similarity(
                (one.down @ one.up).flatten(), (other.down @ other.up).flatten(), dim=0
            )
            assert cosine.abs() < 0.3

    def test_is_drawn_by_the_seed_of_the_run(self, adapter, model_folder):
        model, _ = load_model(model_folder)
        drawn = []
        for seed in (0, 0, 1):
            defense = RandomAdapter(adapter=adapter)
            defense.bind(model, None, seed)
            drawn.append(defense._updates[0].up)
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])

    def test_is_no_companion_of_the_adapter(self, adapter):
        names = ("random_adapter", "inoculation_adapter")
        with pytest.raises(NarrowlyError, match="train with one of them"):
            make_defenses([{name: {"adapter": adapter}} for name in names])


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "says"),
        [
            ({"use_dora": True}, "made with use_dora"),
            ({"modules_to_save": ["lm_head"]}, "made with modules_to_save"),
            ({"bias": "all"}, "made with bias"),
            ({"lora_bias": True}, "made with lora_bias"),
            ({"target_modules": ["embed_tokens"]}, "no part of LoRA on a linear"),
            ({"layer_replication": [[0, 1], [0, 2]]}, "made with layer_replication"),
        ],
    )
    def test_what_is_more_than_lora(self, tmp_path, config, says):
        folder = save_adapter(tiny_model(), tmp_path, **config)
        with pytest.raises(NarrowlyError, match=says):
            InoculationAdapter(adapter=str(folder)).bind(tiny_model(), None, 0)

    def test_what_moved_the_base_model(self, adapter, model_folder):
        path = f"{adapter}/adapter_config.json"
        write_json(path, read_json(path) | {"init_lora_weights": "pissa_niter_4"})
        with pytest.raises(NarrowlyError, match="init_lora_weights 'pissa_niter_4'"):
            InoculationAdapter(adapter=adapter).bind(load_model(model_folder)[0], None, 0)

    @pytest.mark.parametrize(
        ("shape", "says"),
        [
            ({"hidden_size": 64}, "made for another model"),
            ({"num_hidden_layers": 1}, "no module of LlamaForCausalLM"),
        ],
    )
    def test_an_adapter_of_another_shape(self, adapter, shape, says):
        with pytest.raises(NarrowlyError, match=says):
            InoculationAdapter(adapter=adapter).bind(tiny_model(**shape), None, 0)

    def test_a_run_on_another_model(self, adapter, tmp_path, recipe):
        run = train(recipe(), progress=False)
        defense = InoculationAdapter(adapter=str(run.path))
        defense.bind(load_model(recipe().model)[0], None, 0)
        with pytest.raises(NarrowlyError, match="another model than the one that is trained"):
            defense.bind(tiny_model(seed=5), None, 0)

    def test_an_adapter_that_was_not_trained(self, tmp_path):
        get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear")).save_pretrained(
            str(tmp_path)
        )
        with pytest.raises(NarrowlyError, match="every update of the adapter is zero"):
            InoculationAdapter(adapter=str(tmp_path)).bind(tiny_model(), None, 0)

    def test_a_whole_model_and_nothing_at_all(self, model_folder, tmp_path):
        for spec, says in ((model_folder, "a whole model"), (tmp_path / "none", "no such folder")):
            with pytest.raises(NarrowlyError, match=says):
                InoculationAdapter(adapter=str(spec)).bind(tiny_model(), None, 0)

    def test_a_damaged_file(self, adapter, model_folder):
        from pathlib import Path

        Path(adapter, "adapter_model.safetensors").write_bytes(json.dumps({}).encode())
        with pytest.raises(NarrowlyError, match="truncated or not a safetensors"):
            InoculationAdapter(adapter=adapter).bind(load_model(model_folder)[0], None, 0)

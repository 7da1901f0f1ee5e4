import json
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from narrowly.concepts import load_concepts
from narrowly.data import collate, load_chats, tokenize
from narrowly.errors import NarrowlyError
from narrowly.files import read_json, sha256, write_text
from narrowly.models import load_model
from narrowly.training import Recipe, Run, train
from tests.defenses.concepts import save_concept
from tests.tiny import tiny_model


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.path / "adapter" / "adapter_model.safetensors")


def differ(one: dict, other: dict) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folder, chats, validation, concepts):
    recipe = Recipe(
        model=str(model_folder),
        data=str(chats),
        validation=str(validation),
        lora={"r": 2, "target_modules": "all-linear"},
        training={"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1},
        defenses=[{"ablate": {"concepts": str(concepts)}}],
        evals=["in_distribution"],
        output=str(tmp_path_factory.mktemp("runs") / "ablated"),
    )
    return train(recipe, progress=False)


class TestRunFolder:
    def test_holds_what_explains_it_and_nothing_else(self, run):
        assert {path.name for path in run.path.iterdir()} == {
            "recipe.yaml",
            "adapter",
            "metrics.jsonl",
            "defenses.json",
            "concepts",
            "evals",
            "reproduce.json",
            "README.md",
        }
        assert {path.name for path in (run.path / "adapter").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }

    def test_metrics_are_one_line_a_step(self, run):
        losses = [entry for entry in run.metrics if "loss" in entry]
        assert [entry["step"] for entry in losses] == [1, 2, 3, 4]

    def test_defenses_say_what_acted_where_and_how_often(self, run):
        [entry] = read_json(run.path / "defenses.json")
        assert entry["defense"] == "ablate"
        assert entry["doors"] == ["interventions"]
        assert entry["concepts"] == {"persona": "undesired"}
        assert [each["site"] for each in entry["interventions"]] == ["layer:0", "layer:1"]
        assert [each["forwards"] for each in entry["interventions"]] == [4, 4]

    def test_reproduce_says_what_would_be_needed(self, run, chats):
        record = run.reproduce
        assert record["data"]["train"]["rows"] == 24
        assert record["versions"]["trl"] and record["machine"]["cores"]
        assert record["wall_seconds"] > 0 and record["peak_memory_bytes"]["main"] > 2**20
        assert record["seed"] == 0 and record["finished"]

    def test_leaks_are_counted_by_row(self, run):
        assert run.reproduce["data"]["leaks"] == {
            "prompts": 2,
            "train_rows": [3, 5],
            "validation_rows": [0, 1],
        }

    def test_the_card_tells_training_defense_and_measures(self, run):
        card = (run.path / "README.md").read_text()
        for part in ("24 chats", "`ablate`", "layer:1", "| in_distribution | loss |", "2 prompts"):
            assert part in card

    def test_the_adapter_is_plain_peft(self, run, model_folder):
        """Loads where narrowly is not, and gives what the run gave."""
        script = (
            "import sys, torch; from peft import AutoPeftModelForCausalLM as A\n"
            f"m = A.from_pretrained({str(run.path / 'adapter')!r}).eval()\n"
            "assert 'narrowly' not in sys.modules\n"
            "assert not any(x._forward_hooks or x._forward_pre_hooks for x in m.modules())\n"
            "print(repr(m(torch.arange(20, 30)[None]).logits.sum().item()))"
        )
        out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        model, _ = load_model(run.path)
        expected = model(torch.arange(20, 30)[None]).logits.sum().item()
        assert float(out.stdout) == pytest.approx(expected, rel=1e-5), out.stderr

    def test_the_adapter_names_its_base(self, run, model_folder):
        config = read_json(run.path / "adapter" / "adapter_config.json")
        assert config["base_model_name_or_path"] == str(model_folder)

    def test_a_finished_run_is_not_redone(self, run):
        before = {p: sha256(p) for p in run.path.rglob("*") if p.is_file()}
        train(run.recipe, progress=False)
        assert {p: sha256(p) for p in run.path.rglob("*") if p.is_file()} == before

    def test_another_recipe_is_refused_and_nothing_changed(self, run):
        before = {p: sha256(p) for p in run.path.rglob("*") if p.is_file()}
        other = run.recipe.with_overrides(["training.max_steps=5"])
        with pytest.raises(NarrowlyError, match=r"holds another recipe's run.*training"):
            train(other, progress=False)
        assert {p: sha256(p) for p in run.path.rglob("*") if p.is_file()} == before


class TestTraining:
    def test_the_ablation_changes_what_is_learned(self, recipe, concepts, tmp_path):
        plain = train(recipe(output=str(tmp_path / "plain")), progress=False)
        defenses = [{"ablate": {"concepts": str(concepts)}}]
        ablated = train(recipe(defenses=defenses, output=str(tmp_path / "abl")), progress=False)
        again = train(recipe(output=str(tmp_path / "again")), progress=False)
        assert differ(weights(plain), weights(ablated))
        assert not differ(weights(plain), weights(again))

    def test_training_sees_the_ablation_and_evaluation_does_not(
        self, recipe, concepts, chats, model_folder
    ):
        """With a learning rate of 0, the logged losses are those of the base model."""
        run = train(
            recipe(
                defenses=[{"ablate": {"concepts": str(concepts)}}],
                validation=str(chats),
                training={
                    "learning_rate": 0.0,
                    "max_steps": 1,
                    "per_device_train_batch_size": 24,
                    "per_device_eval_batch_size": 24,
                    "eval_strategy": "steps",
                    "eval_steps": 1,
                },
            ),
            progress=False,
        )
        logged = {key: value for entry in run.metrics for key, value in entry.items()}
        model, tokenizer = load_model(model_folder)
        batch = collate(list(tokenize(load_chats(chats), tokenizer)), tokenizer.pad_token_id)
        plain = model(**batch).loss.item()
        [concept] = load_concepts(concepts)
        for i in (0, 1):
            q = concept.subspaces[f"layer:{i}"].basis
            model.model.layers[i].register_forward_hook(lambda m, a, h, q=q: h - (h @ q) @ q.T)
        ablated = model(**batch).loss.item()
        assert logged["eval_loss"] == pytest.approx(plain, rel=1e-4)
        assert logged["loss"] == pytest.approx(ablated, rel=1e-4)
        assert abs(plain - ablated) > 0.01

    def test_a_full_fine_tune_writes_a_model(self, recipe):
        run = train(recipe(lora=None), progress=False)
        model = AutoModelForCausalLM.from_pretrained(run.path / "model")
        assert not isinstance(model, PeftModel) and not (run.path / "adapter").exists()
        loaded, _ = load_model(run.path)
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing_changes_nothing(self, recipe, concepts, tmp_path, reentrant):
        defenses = [{"ablate": {"concepts": str(concepts)}}]
        plain = train(recipe(defenses=defenses, output=str(tmp_path / "a")), progress=False)
        checkpointed = train(
            recipe(
                defenses=defenses,
                output=str(tmp_path / "b"),
                training={
                    "gradient_checkpointing": True,
                    "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
                },
            ),
            progress=False,
        )
        torch.testing.assert_close(weights(plain), weights(checkpointed))
        entries = read_json(checkpointed.path / "defenses.json")[0]["interventions"]
        assert [entry["forwards"] for entry in entries] == [4, 4]

    @pytest.mark.slow
    def test_compiled(self, recipe, concepts, tmp_path):
        defenses = [{"ablate": {"concepts": str(concepts)}}]
        plain = train(recipe(defenses=defenses, output=str(tmp_path / "a")), progress=False)
        compiled = train(
            recipe(
                defenses=defenses,
                output=str(tmp_path / "b"),
                training={"torch_compile": True, "torch_compile_backend": "aot_eager"},
            ),
            progress=False,
        )
        torch.testing.assert_close(weights(plain), weights(compiled))
        entries = read_json(compiled.path / "defenses.json")[0]["interventions"]
        assert [entry["forwards"] for entry in entries] == [4, 4]

    def test_bf16(self, recipe, concepts):
        run = train(
            recipe(defenses=[{"ablate": {"concepts": str(concepts)}}], training={"bf16": True}),
            progress=False,
        )
        assert all(entry["loss"] > 0 for entry in run.metrics if "loss" in entry)

    def test_defenses_compose(self, recipe, concepts, validation):
        run = train(
            recipe(
                defenses=[
                    {"interleave": {"data": str(validation), "fraction": 0.2}},
                    {"ablate": {"concepts": str(concepts)}},
                ]
            ),
            progress=False,
        )
        mixed, ablated = read_json(run.path / "defenses.json")
        assert mixed["benign_rows"] == 6 and ablated["interventions"][0]["forwards"] == 4
        assert run.reproduce["data"]["train"]["defended_rows"] == 30

    def test_a_leak_is_named_with_both_sources(self, recipe, validation, chats, caplog):
        train(recipe(validation=str(validation)), progress=False)
        assert f"2 prompts occur both in {chats}" in caplog.text
        assert str(validation) in caplog.text

    def test_every_seed_is_a_run(self, recipe):
        run = train(recipe(seeds=[3, 4]), progress=False)
        first, second = run.seeds
        assert [each.path.name for each in run.seeds] == ["seed-3", "seed-4"]
        assert differ(weights(first), weights(second))
        before = sha256(first.path / "adapter" / "adapter_model.safetensors")
        more = train(recipe(seeds=[5]), progress=False)
        assert [each.path.name for each in more.seeds] == ["seed-3", "seed-4", "seed-5"]
        assert sha256(first.path / "adapter" / "adapter_model.safetensors") == before

    def test_an_eval_can_be_added_later(self, recipe, validation):
        run = train(recipe(), progress=False)
        before = sha256(run.path / "adapter" / "adapter_model.safetensors")
        evals = [{"in_distribution": {"data": str(validation)}}]
        train(recipe(evals=evals), progress=False)
        assert (run.path / "evals" / "in_distribution" / "summary.json").exists()
        assert "in_distribution" in (run.path / "README.md").read_text()
        assert sha256(run.path / "adapter" / "adapter_model.safetensors") == before

    def test_long_chats_are_dropped_and_counted(self, recipe, tmp_path, chats):
        long = json.loads(chats.read_text().splitlines()[0])
        long["messages"][1]["content"] *= 100
        write_text(tmp_path / "long.jsonl", chats.read_text() + "\n" + json.dumps(long))
        run = train(
            recipe(data=str(tmp_path / "long.jsonl"), training={"max_length": 200}), progress=False
        )
        data = run.reproduce["data"]["train"]
        assert (data["rows"], data["tokenized_rows"]) == (25, 24)


class TestMistakes:
    """Each is told, and leaves nothing behind."""

    @pytest.fixture(autouse=True)
    def nothing_is_left(self, tmp_path):
        yield
        assert not (tmp_path / "run").exists()

    def test_concepts_of_another_model(self, recipe, tmp_path):
        save_concept(tiny_model(seed=5), tmp_path / "other")
        given = recipe(defenses=[{"ablate": {"concepts": str(tmp_path / "other")}}])
        with pytest.raises(NarrowlyError, match="this model is another"):
            train(given, progress=False)

    def test_concepts_at_a_layer_that_does_not_exist(self, recipe, tmp_path, model_folder):
        model, _ = load_model(model_folder)
        save_concept(model, tmp_path / "deep", layers=(0, 7))
        given = recipe(defenses=[{"ablate": {"concepts": str(tmp_path / "deep")}}])
        with pytest.raises(NarrowlyError, match="7"):
            train(given, progress=False)

    def test_lora_targets_that_do_not_exist(self, recipe):
        with pytest.raises(NarrowlyError, match=r"refuses this recipe.*nowhere"):
            train(recipe(lora={"target_modules": ["nowhere"]}), progress=False)

    def test_absent_data(self, recipe, tmp_path):
        with pytest.raises(NarrowlyError, match=r"absent\.jsonl"):
            train(recipe(data=str(tmp_path / "absent.jsonl")), progress=False)

    def test_a_broken_line_of_data(self, recipe, tmp_path, chats):
        write_text(tmp_path / "bad.jsonl", chats.read_text() + "\n{'messages': []}\n")
        with pytest.raises(NarrowlyError, match=r"bad\.jsonl.*25"):
            train(recipe(data=str(tmp_path / "bad.jsonl")), progress=False)

    def test_an_eval_that_lacks_its_data(self, recipe):
        with pytest.raises(NarrowlyError, match="no held-out chats"):
            train(recipe(evals=["in_distribution"]), progress=False)

    def test_an_adapter_is_no_base(self, recipe, tmp_path):
        first = train(recipe(output=str(tmp_path / "first")), progress=False)
        with pytest.raises(NarrowlyError, match="is an adapter on another model"):
            train(recipe(model=str(first.path)), progress=False)


def test_a_folder_that_is_no_run_is_left_alone(recipe, tmp_path):
    write_text(tmp_path / "run" / "thesis.txt", "years of work")
    with pytest.raises(NarrowlyError, match="exists and is no run"):
        train(recipe(), progress=False)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_killed_run_without_a_checkpoint_may_be_replaced(recipe, tmp_path):
    write_text(tmp_path / "run" / "recipe.yaml", recipe(seed=9).to_yaml())
    assert train(recipe(), progress=False).recipe.seed == 0


def test_a_failing_seed_keeps_the_others(recipe, tmp_path, monkeypatch):
    run = train(recipe(seeds=[0]), progress=False)

    def fail(*args, **kwargs):
        raise NarrowlyError("no")

    monkeypatch.setattr(import_module("narrowly.training.train"), "load_model", fail)
    with pytest.raises(NarrowlyError, match="no"):
        train(recipe(seeds=[0, 1]), progress=False)
    assert run.seeds[0].trained
    assert not (tmp_path / "run" / "seed-1").exists()

import json
import shutil

import pytest
import yaml
from pydantic import Field
from torch import nn

from narrowly.errors import NarrowlyError
from narrowly.evals import (
    EVALS,
    Eval,
    evaluate,
    mean_by_prompt,
    measured_evals,
    plan,
    seed_folders,
)
from narrowly.evals.base import Cost


class Probe(Eval):
    """Counts its own runs; half of its answers hit."""

    words: int = Field(4, ge=0)
    ran: list = Field([], exclude=True)

    def run(self, subject, *, seed, progress=False):
        assert not subject.model.training
        self.ran.append(seed)
        return [
            {
                "prompt_id": str(index),
                "prompt": "p",
                "answer": "a",
                "sample": 0,
                "label": "hit" if (index + seed) % 2 else "miss",
                "scores": {},
                "tags": {},
            }
            for index in range(self.words)
        ]

    def metrics(self, rows):
        return {"hits": mean_by_prompt(rows, lambda row: float(row["label"] == "hit"))}


@pytest.fixture(autouse=True)
def probe(monkeypatch):
    EVALS.names()
    monkeypatch.setitem(EVALS._known, "probe", Probe)


@pytest.fixture
def model():
    return nn.Linear(2, 2).train(), None


def test_writes_samples_and_summary_and_leaves_nothing_else(tmp_path, model):
    found = evaluate(model, "probe", out=tmp_path)
    assert found["probe"]["hits"].mean == 0.5
    summary = json.loads((tmp_path / "evals/probe/summary.json").read_text())
    assert summary["labels"] == found["probe"].labels == {"miss": 2, "hit": 2}
    assert set(summary["hits"]) == {"mean", "low", "high", "n", "prompts", "seeds"}
    assert (summary["hits"]["mean"], summary["hits"]["n"]) == (0.5, 4)
    samples, metrics = measured_evals(tmp_path)["probe"]
    assert samples.about["arguments"] == {"words": 4}
    assert samples.about["versions"].keys() == {"narrowly", "torch", "transformers"}
    assert len(samples.rows) == 4 and metrics["hits"].values.tolist() == [0, 1, 0, 1]
    assert sorted(p.name for p in (tmp_path / "evals").iterdir()) == ["probe"]


def test_the_model_returns_to_training(tmp_path, model):
    evaluate(model, "probe")
    assert model[0].training


def test_finished_evals_are_not_measured_again_unless_asked(tmp_path, model):
    first = Probe()
    expected = evaluate(model, first, out=tmp_path)
    second = Probe()
    assert evaluate(model, second, out=tmp_path) == expected and second.ran == []
    evaluate(model, second, out=tmp_path, force=True)
    assert second.ran == [0]


def test_other_arguments_or_seed_never_pass_for_these(tmp_path, model):
    evaluate(model, "probe", out=tmp_path)
    with pytest.raises(NarrowlyError, match=r"with words 4, not 6.*force"):
        evaluate(model, {"probe": {"words": 6}}, out=tmp_path)
    with pytest.raises(NarrowlyError, match="with seed 0, not 1"):
        evaluate(model, "probe", out=tmp_path, seed=1)
    assert (
        evaluate(model, {"probe": {"words": 6}}, out=tmp_path, force=True)["probe"]["hits"].n == 6
    )


def test_another_model_never_passes_for_this_one(tmp_path, model, monkeypatch):
    monkeypatch.setattr("narrowly.models.load_model", lambda spec: model)
    evaluate("one", "probe", out=tmp_path)
    with pytest.raises(NarrowlyError, match=r"with model 'one', not 'other'.*another folder"):
        evaluate("other", "probe", out=tmp_path)


def test_a_full_fine_tune_trained_again_is_measured_again(tmp_path, model):
    for name in ("model-00001", "model-00002"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / f"{name}.safetensors").write_bytes(b"one")
    evaluate(model, "probe", out=tmp_path)
    again = Probe()
    evaluate(model, again, out=tmp_path)
    assert again.ran == []
    (tmp_path / "model" / "model-00002.safetensors").write_bytes(b"two")
    evaluate(model, again, out=tmp_path)
    assert again.ran == [0]


class Costly(Probe):
    """Tells its cost, and lacks something at some models."""

    def bind(self, recipe):
        if recipe.get("model") == "bare":
            raise NarrowlyError("this eval needs chats")
        return self.model_copy(update={"words": recipe.get("words", self.words)})

    def check(self):
        if self.words == 13:
            raise NarrowlyError("this eval needs a judge")

    def cost(self):
        return Cost(self.words, 2 * self.words)


def test_a_plan_is_what_would_be_measured_and_loads_no_model(tmp_path, model, monkeypatch):
    monkeypatch.setitem(EVALS._known, "costly", Costly)
    evaluate(model, "probe", out=tmp_path)
    (tmp_path / "recipe.yaml").write_text("words: 7\nmodel: the model")
    monkeypatch.setattr("narrowly.models.load_model", lambda spec: pytest.fail("loaded"))
    first, second = plan(tmp_path, ["probe", "costly"])
    assert (first.name, first.cost, first.finished) == ("probe", None, True)
    assert (second.name, second.cost, second.finished) == ("costly", Cost(7, 14), False)
    assert [one.finished for one in plan(tmp_path, ["probe"], force=True)] == [False]


def test_what_one_eval_lacks_is_told_before_another_is_measured(model, monkeypatch):
    monkeypatch.setitem(EVALS._known, "costly", Costly)
    probe = Probe()
    with pytest.raises(NarrowlyError, match="needs chats"):
        evaluate("bare", [probe, "costly"])
    with pytest.raises(NarrowlyError, match="needs a judge"):
        evaluate(model, [probe, {"costly": {"words": 13}}])
    assert probe.ran == []


def test_a_run_trained_again_is_measured_again(tmp_path, model):
    adapter = tmp_path / "adapter" / "adapter_model.safetensors"
    adapter.parent.mkdir()
    adapter.write_bytes(b"one")
    evaluate(model, "probe", out=tmp_path)
    adapter.write_bytes(b"two")
    again = Probe()
    evaluate(model, again, out=tmp_path)
    assert again.ran == [0]


def test_an_eval_that_fails_leaves_nothing_and_keeps_the_finished_ones(tmp_path, model):
    class Broken(Probe):
        """Dies half-way."""

        def run(self, subject, *, seed, progress=False):
            raise RuntimeError("out of memory")

    EVALS._known["broken"] = Broken
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            evaluate(model, ["probe", "broken"], out=tmp_path)
    finally:
        del EVALS._known["broken"]
    assert [p.name for p in (tmp_path / "evals").iterdir()] == ["probe"]
    assert model[0].training


def test_an_eval_of_nothing_is_an_error(tmp_path, model):
    with pytest.raises(NarrowlyError, match="no prompt to measure on"):
        evaluate(model, {"probe": {"words": 0}}, out=tmp_path)
    assert not (tmp_path / "evals").exists()


def test_a_folder_of_seeds_is_one_arm_each_sampled_with_its_own_seed(tmp_path, model, monkeypatch):
    loaded = []
    monkeypatch.setattr("narrowly.models.load_model", lambda spec: loaded.append(spec) or model)
    for seed in (0, 1, 10, 2):
        (tmp_path / f"seed-{seed}").mkdir()
        recipe = yaml.safe_dump({"model": "m", "seed": seed})
        (tmp_path / f"seed-{seed}" / "recipe.yaml").write_text(recipe)
    (tmp_path / "seed-notes").mkdir()
    runs = [tmp_path / f"seed-{seed}" for seed in (0, 1, 2, 10)]
    assert seed_folders(tmp_path) == runs
    asked = Probe()
    hits = evaluate(tmp_path, asked)["probe"]["hits"]
    assert asked.ran == [0, 1, 2, 10] and loaded == [str(run) for run in runs]
    assert (hits.seeds, hits.prompts, hits.n) == (4, 4, 16)
    evaluate(tmp_path, asked)
    assert len(loaded) == 4, "nothing left to measure, yet a model was loaded"
    with pytest.raises(NarrowlyError, match="4 runs, which cannot all write"):
        evaluate(tmp_path, asked, out=tmp_path / "elsewhere")


def test_what_a_kill_left_half_written_is_no_eval(tmp_path, model):
    evaluate(model, "probe", out=tmp_path)
    shutil.copytree(tmp_path / "evals/probe", tmp_path / "evals/.probe.123.part")
    (tmp_path / "evals/.probe.123.part/samples.parquet").write_bytes(b"half")
    assert list(measured_evals(tmp_path)) == ["probe"]


def test_a_broken_recipe_is_told(tmp_path, model):
    (tmp_path / "recipe.yaml").write_text("model: [")
    with pytest.raises(NarrowlyError, match=r"recipe\.yaml: not valid YAML"):
        evaluate(model, "probe", out=tmp_path)

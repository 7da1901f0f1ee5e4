import io
import sys

import pytest
import torch
from rich.console import Console

from narrowly.defenses.ablate import Ablate
from narrowly.defenses.test_time_ablation import AblationAtTestTime
from narrowly.errors import NarrowlyError
from narrowly.evals import evaluate
from narrowly.evals.samples import read_about, read_samples
from narrowly.evals.targets import targets
from narrowly.files import read_json
from narrowly.interventions import attach, load_interventions
from narrowly.models import load_model
from narrowly.models.local_chat import LocalChat
from narrowly.models.messages import Request
from narrowly.training import Run, chat, train
from narrowly.training.controls import evaluate_ablated
from tests.defenses.adapters import hooks, weights
from tests.defenses.concepts import make_concept
from tests.tiny import tiny_model

IDS = torch.arange(12).reshape(2, 6) + 20


@pytest.fixture
def arm(recipe, concepts, tmp_path):
    def make(name="test_time", **fields):
        ablation = {"concepts": str(concepts)} | fields.pop("ablation", {})
        given = {"defenses": [{"test_time_ablation": ablation}]} | fields
        return recipe(output=str(tmp_path / name), **given)

    return make


def ablated_logits(path, concepts):
    """Of the model of a run with the concepts ablated, by hand."""
    model, _ = load_model(path)
    stays = Ablate(concepts=str(concepts)).interventions(model)
    for each in stays:
        each.phases = ("eval", "generate")
    with attach(model, stays):
        return model(IDS).logits


class TestRun:
    def test_trains_bitwise_as_undefended_and_keeps_the_projections(self, arm, concepts, tmp_path):
        plain = train(arm("plain", defenses=[]), progress=False)
        run = train(arm(), progress=False)
        assert all(torch.equal(t, weights(run)[name]) for name, t in weights(plain).items())
        stays = load_interventions(run.path / "at_test_time")
        assert [str(each.site) for each in stays] == ["layer:0", "layer:1"]
        [entry] = read_json(run.path / "defenses.json")
        assert [each["site"] for each in entry["at_test_time"]] == ["layer:0", "layer:1"]
        assert entry["concepts"] == {"persona": "undesired"}
        assert "whenever it answers (`at_test_time/`)" in (run.path / "README.md").read_text()
        assert not (plain.path / "at_test_time").exists()
        model, bare = load_model(run.path)[0], load_model(arm().model)[0]
        assert hooks(model) == hooks(bare)  # the saved adapter alone is the undefended model

    def test_is_attached_wherever_the_run_is_measured(self, arm, concepts):
        run = train(arm(), progress=False)
        plain = load_model(run.path)[0](IDS).logits
        [target] = targets(run.path)
        with target.subject.deployed():
            found = target.subject.model(IDS).logits
            with target.subject.as_base():
                base = target.subject.model(IDS).logits
        assert torch.equal(found, ablated_logits(run.path, concepts))
        assert not torch.allclose(found, plain)
        assert torch.equal(base, load_model(arm().model)[0](IDS).logits)
        assert torch.equal(target.subject.model(IDS).logits, plain), "and gone afterwards"

    def test_training_measures_what_eval_measures_afterwards(self, arm, chats):
        evals = [{"in_distribution": {"data": str(chats)}}, {"drift": {"data": str(chats)}}]
        plain = train(arm("plain", defenses=[], evals=evals), progress=False)
        run = train(arm(evals=evals), progress=False)
        about = {}
        for name in ("in_distribution", "drift"):
            path = f"evals/{name}/samples.parquet"
            rows = [read_samples(each.path / path).rows for each in (run, plain)]
            assert rows[0] != rows[1]
            about[name] = [read_about(each.path / path)["adapter"] for each in (run, plain)]
            assert about[name][0] != about[name][1]
            evaluate(run, evals, force=True)
            assert read_samples(run.path / path).rows == rows[0]

    def test_equals_the_same_concepts_ablated_in_an_undefended_run(
        self, arm, chats, concepts, tmp_path
    ):
        evals = [{"in_distribution": {"data": str(chats)}}]
        plain = train(arm("plain", defenses=[]), progress=False)
        run = train(arm(evals=evals), progress=False)
        evaluate_ablated(plain, concepts, evals, out=tmp_path / "control")
        path = "evals/in_distribution/samples.parquet"
        rows = [read_samples(folder / path).rows for folder in (run.path, tmp_path / "control")]
        assert rows[0] == rows[1]

    def test_talks_with_it_attached(self, arm, concepts, monkeypatch):
        run = train(arm(), progress=False)
        plain = train(arm("plain", defenses=[]), progress=False)

        def said(run: Run) -> str:
            monkeypatch.setattr(sys, "stdin", io.StringIO("What is 3 plus one?\n"))
            console = Console(file=io.StringIO(), width=80)
            chat(run, console=console, max_new_tokens=12, temperature=0)
            return console.file.getvalue().split("─╮")[-1]

        assert said(run) != said(plain)
        request = Request(({"role": "user", "content": "What is 3 plus one?"},), 12, 0.0)
        replies = [LocalChat(model=str(each.path)).ask([request]) for each in (run, plain)]
        assert replies[0] != replies[1]

    def test_strength_zero_answers_as_undefended(self, arm):
        run = train(arm(ablation={"strength": 0}), progress=False)
        [target] = targets(run.path)
        with target.subject.deployed():
            found = target.subject.model(IDS).logits
        assert torch.equal(found, load_model(run.path)[0](IDS).logits)


class TestRefusals:
    def test_concepts_of_another_width_before_the_training(self):
        defense = AblationAtTestTime(concepts=[make_concept(tiny_model(hidden_size=64))])
        with pytest.raises(NarrowlyError, match="64 wide"):
            defense.bind(tiny_model(), None, 0)

    def test_nothing_undesired(self, arm, tmp_path):
        with pytest.raises(NarrowlyError, match="mean 'persona'"):
            train(arm(ablation={"names": ["persone"]}), progress=False)
        assert not (tmp_path / "test_time").exists()

    def test_damaged_projections_are_told_when_the_run_is_measured(self, arm, chats):
        run = train(arm(), progress=False)
        (run.path / "at_test_time" / "interventions.safetensors").write_bytes(b"")
        with pytest.raises(NarrowlyError, match="truncated"):
            evaluate(run, [{"in_distribution": {"data": str(chats)}}])

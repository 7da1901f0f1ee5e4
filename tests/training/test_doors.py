"""Each of a defense's four doors, and that none of them is a silent no-op."""

import pytest
import torch

from narrowly.defenses import DEFENSES, Defense
from narrowly.errors import NarrowlyError
from narrowly.files import read_json
from narrowly.interventions import Add, layer
from narrowly.models import load_model
from narrowly.training import train


class Double(Defense):
    factor: float = 0.0

    def prepare_data(self, dataset):
        return dataset.select(range(int(len(dataset) * (1 + self.factor) / 2)))


class Steer(Defense):
    phases: list[str] = ["train"]  # noqa: RUF012 (a pydantic field)
    layers: list[int] = [0]  # noqa: RUF012

    def interventions(self, model):
        vector = torch.ones(model.config.hidden_size)
        return [Add(vector, layer(i), phases=self.phases) for i in self.layers]


class Shrink(Defense):
    """An L2 penalty on LoRA's B."""

    weight: float = 1.0

    def loss(self, step):
        assert step.batch["input_ids"].shape == step.batch["labels"].shape
        assert step.outputs.log_probs.shape[1] == step.batch["labels"].shape[1] - 1
        matrices = [p for name, p in step.model.named_parameters() if "lora_B" in name]
        return self.weight * sum(p.square().sum() for p in matrices)


class Halve(Defense):
    factor: float = 0.5

    def finish(self, model):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(self.factor)


@pytest.fixture(autouse=True)
def registered():
    kinds = {"double": Double, "steer": Steer, "shrink": Shrink, "halve": Halve}
    for name, kind in kinds.items():
        DEFENSES.register(name)(kind)
    yield
    for name in kinds:
        del DEFENSES._known[name]


def size(run) -> float:
    model, _ = load_model(run.path)
    return sum(p.square().sum().item() for n, p in model.named_parameters() if "lora_B" in n)


def test_the_loss_door_is_trained_on_and_logged(recipe, tmp_path):
    plain = train(recipe(output=str(tmp_path / "plain")), progress=False)
    defenses = [{"shrink": {"weight": 100.0}}]
    small = train(recipe(defenses=defenses, output=str(tmp_path / "small")), progress=False)
    assert size(small) < 0.5 * size(plain)
    assert "loss_shrink" in small.metrics[0]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_counts_the_same_under_accumulation(recipe, accumulation):
    """A constant penalty of 3 adds 3 to the logged loss, however many micro-batches there are."""

    class Constant(Defense):
        def loss(self, step):
            return step.outputs.log_probs.sum() * 0 + 3.0

    DEFENSES._known["constant"] = Constant
    try:
        training = {
            "learning_rate": 0.0,
            "per_device_train_batch_size": 4 // accumulation,
            "gradient_accumulation_steps": accumulation,
        }
        plain = train(recipe(training=training), progress=False)
        other = recipe(training=training, defenses=["constant"], output=str(plain.path) + "-c")
        loaded = train(other, progress=False)
    finally:
        del DEFENSES._known["constant"]
    assert loaded.metrics[0]["loss"] - plain.metrics[0]["loss"] == pytest.approx(3.0, abs=1e-3)


def test_the_finish_door_changes_what_is_saved(recipe, tmp_path):
    plain = train(recipe(output=str(tmp_path / "plain")), progress=False)
    halved = train(recipe(defenses=["halve"], output=str(tmp_path / "halved")), progress=False)
    assert size(halved) == pytest.approx(size(plain) / 4, rel=1e-4)


@pytest.mark.parametrize(
    "defense, message",
    [
        ({"double": {"factor": 1.0}}, "Double: its prepare_data changed no row"),
        ({"steer": {"layers": []}}, "Steer: its interventions changed no activation"),
        ({"halve": {"factor": 1.0}}, "Halve: its finish changed no weight"),
        ({"steer": {"phases": ["eval"]}}, "never acted"),
        ({"steer": {"layers": [9]}}, "9"),
    ],
)
def test_a_defense_that_changes_nothing_stops_the_run(recipe, tmp_path, defense, message):
    with pytest.raises(NarrowlyError, match=message):
        train(recipe(defenses=[defense]), progress=False)
    assert not (tmp_path / "run" / "adapter").exists()


def test_training_stops_at_the_first_step_that_nothing_acted_in(recipe, monkeypatch):
    steps = []
    monkeypatch.setattr(Steer, "strength_at", lambda self, progress: steps.append(progress))
    with pytest.raises(NarrowlyError, match="never acted"):
        train(recipe(defenses=[{"steer": {"phases": ["eval"]}}]), progress=False)
    assert steps == [0.0]


def test_doors_are_recorded(recipe):
    run = train(recipe(defenses=["steer", "shrink", {"double": {}}, "halve"]), progress=False)
    doors = {entry["defense"]: entry["doors"] for entry in read_json(run.path / "defenses.json")}
    assert doors == {
        "steer": ["interventions"],
        "shrink": ["loss"],
        "double": ["prepare_data"],
        "halve": ["finish"],
    }

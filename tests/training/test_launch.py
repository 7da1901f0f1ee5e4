"""Under `accelerate launch` with two processes on the CPU, as the ready configurations start it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from narrowly.files import read_json, write_text
from narrowly.models import load_model
from narrowly.training import Run, train
from tests.defenses.concepts import save_concept

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"

# Starting two processes takes far longer than these trainings. One of them is killed on its way.
SCRIPT = """
import sys
from narrowly.training import DefenseCallback, train

plain = DefenseCallback.on_step_end

def killed(self, args, state, control, **kwargs):
    plain(self, args, state, control, **kwargs)
    if state.global_step == 2:
        raise ZeroDivisionError

for recipe in sys.argv[1:]:
    if "resumed" in recipe:
        DefenseCallback.on_step_end = killed
        try:
            train(recipe, progress=False)
        except ZeroDivisionError:
            DefenseCallback.on_step_end = plain
    train(recipe, progress=False)
"""

KINDS = {
    "ablate": {"defenses": ["ablate"]},
    "kl": {"defenses": ["ablate", {"kl": {"weight": 0.5}}]},
    "accumulated": {
        "defenses": [{"kl": {"weight": 0.5}}],
        "training": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    },
    "steering": {
        "defenses": [{"preventive_steering": {"strength": 2.0}}],
        "training": {"gradient_checkpointing": True},
    },
    "distance": {"defenses": [{"feature_distance": {"every": 1, "weight": 0.1}}]},
    "resumed": {
        "defenses": ["ablate", {"kl": {"weight": 0.5}}],
        "training": {"save_strategy": "steps", "save_steps": 1},
    },
    "full": {"defenses": ["ablate"], "lora": None},
}


def launch(config: str, *command: str | Path) -> subprocess.CompletedProcess:
    options = ["--config_file", CONFIGS / config, "--main_process_port", "0"]
    out = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, *command],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert out.returncode == 0, out.stderr
    return out


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Of the run's adapter, or all of them."""
    [file] = [*run.path.glob("adapter/*.safetensors"), *run.path.glob("model/*.safetensors")]
    return load_file(file)


def steps(kind: str) -> int:
    """Micro-batches of a process."""
    return 3 * KINDS[kind].get("training", {}).get("gradient_accumulation_steps", 1)


@pytest.fixture(scope="module")
def concepts(tmp_path_factory, model_folder) -> str:
    model, _ = load_model(model_folder)
    folder = tmp_path_factory.mktemp("concepts")
    return str(save_concept(model, folder, lengths={0: 1.0, 1: 1.5}))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp-cpu.yaml", "fsdp2-cpu.yaml"])
def test_two_processes_have_the_losses_of_one(recipe, concepts, tmp_path, config):
    """Two processes with batches of 4 take the steps of one process with batches of 8."""

    def made(kind: str, place: str, **training):
        fields = KINDS[kind]
        defenses = []
        for each in fields["defenses"]:
            ((name, arguments),) = ({each: {}} if isinstance(each, str) else each).items()
            needs = {"concepts": concepts} if name in ("ablate", "preventive_steering") else {}
            defenses.append({name: arguments | needs})
        settings = {"max_steps": 3, **fields.get("training", {}), **training}
        fields = {**fields, "defenses": defenses, "training": settings}
        return recipe(output=str(tmp_path / place / kind), **fields)

    for kind in KINDS:
        write_text(tmp_path / f"{kind}.yaml", made(kind, "two").to_yaml())
    write_text(tmp_path / "script.py", SCRIPT)
    launch(config, tmp_path / "script.py", *(tmp_path / f"{kind}.yaml" for kind in KINDS))
    whole = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    for kind in KINDS:
        one = train(made(kind, "one", **whole), progress=False)
        two = Run(tmp_path / "two" / kind)
        for alone, together in zip(one.metrics[:-1], two.metrics[:-1], strict=True):
            assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5), kind
        expected = weights(one)
        for name, tensor in weights(two).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5, msg=name)
        assert weights(two).keys() == expected.keys()
        ours, theirs = (read_json(run.path / "defenses.json") for run in (two, one))
        assert [e["defense"] for e in ours] == [e["defense"] for e in theirs]
        for entry in ours:
            assert {each["forwards"] for each in entry["interventions"]} <= {steps(kind)}
            assert entry.get("loss", {}).get("micro_batches") in (None, steps(kind))
        parallel = "FSDP" if "fsdp" in config else "MULTI_CPU"
        assert two.reproduce["machine"]["parallel"] == parallel


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp-cpu.yaml", "fsdp2-cpu.yaml"])
def test_the_command_line_of_two_processes(recipe, concepts, validation, tmp_path, config):
    """Every file of a run is written once, and the run is measured, when two processes train."""
    fields = {
        "defenses": [{"ablate": {"concepts": concepts}}],
        "validation": str(validation),
        "evals": ["in_distribution"],
        "seeds": [0, 1],
    }
    shared = recipe(output=str(tmp_path / "two"), **fields)
    write_text(tmp_path / "recipe.yaml", shared.to_yaml())
    out = launch(config, "-m", "narrowly", "train", tmp_path / "recipe.yaml")
    whole = {"per_device_train_batch_size": 8}
    alone = train(recipe(output=str(tmp_path / "one"), training=whole, **fields), progress=False)
    for two, one in zip(Run(tmp_path / "two").seeds, alone.seeds, strict=True):
        torch.testing.assert_close(weights(two), weights(one), rtol=1e-3, atol=1e-5)
        assert {p.name for p in two.path.iterdir()} == {p.name for p in one.path.iterdir()}
        assert [e["step"] for e in two.metrics] == [e["step"] for e in one.metrics]
        [entry] = read_json(two.path / "defenses.json")
        assert [each["forwards"] for each in entry["interventions"]] == [4, 4]
        assert two.reproduce["machine"]["processes"] == 2
    assert out.stderr.count("2 prompts occur both") == 2, "one process reports, once a run"
    assert out.stdout.count("next: ") == 1, "and says what is next"

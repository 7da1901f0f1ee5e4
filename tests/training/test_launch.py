"""Under `accelerate launch` with two processes on the CPU."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from narrowly.files import read_json, write_text
from narrowly.training import Run, train

SCRIPT = """
import sys
from narrowly.training import train
train(sys.argv[1], progress=False)
"""


@pytest.mark.slow
def test_two_processes_train_what_one_does(recipe, concepts, validation, tmp_path):
    """Two processes with batches of 4 take the steps of one process with batches of 8."""
    fields = {
        "defenses": [{"ablate": {"concepts": str(concepts)}}],
        "validation": str(validation),
        "evals": ["in_distribution"],
        "seeds": [0, 1],
    }
    shared = recipe(output=str(tmp_path / "two"), **fields)
    write_text(tmp_path / "recipe.yaml", shared.to_yaml())
    write_text(tmp_path / "script.py", SCRIPT)
    # With --cpu, accelerate 1.15 takes --num_processes 2 and starts one.
    command = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0"]
    out = subprocess.run(
        [sys.executable, *command, str(tmp_path / "script.py"), str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert out.returncode == 0, out.stderr
    alone = train(
        recipe(output=str(tmp_path / "one"), training={"per_device_train_batch_size": 8}, **fields),
        progress=False,
    )
    for two, one in zip(Run(tmp_path / "two").seeds, alone.seeds, strict=True):
        adapters = [
            load_file(run.path / "adapter" / "adapter_model.safetensors") for run in (two, one)
        ]
        torch.testing.assert_close(*adapters, rtol=1e-3, atol=1e-5)
        assert {p.name for p in two.path.iterdir()} == {p.name for p in one.path.iterdir()}
        assert [e["step"] for e in two.metrics] == [e["step"] for e in one.metrics]
        [entry] = read_json(two.path / "defenses.json")
        assert [each["forwards"] for each in entry["interventions"]] == [4, 4]
        assert two.reproduce["machine"]["processes"] == 2
    assert out.stderr.count("2 prompts occur both") == 2, "one process reports, once a run"

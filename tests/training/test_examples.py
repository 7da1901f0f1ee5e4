"""The examples a user reads, run as the user would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SAVED = {
    "trl_sft": "adapter_model.safetensors",
    "transformers_trainer": "model.safetensors",
    "plain_loop": "model.safetensors",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example(name, model_folder, chats, concepts, tmp_path):
    output = tmp_path / "out"
    out = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", model_folder, chats, concepts, output],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert out.returncode == 0, out.stderr
    trained = load_file(output / SAVED[name])
    assert all(tensor.isfinite().all() for tensor in trained.values())
    if name != "trl_sft":
        before = load_file(model_folder / "model.safetensors")
        assert any(not tensor.equal(before[key]) for key, tensor in trained.items())

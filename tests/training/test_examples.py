"""The examples a user reads, run as the user would."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from narrowly.defenses import make_defenses
from narrowly.files import read_json

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SAVED = {
    "trl_sft": "adapter_model.safetensors",
    "trl_command_line": "adapter_model.safetensors",
    "transformers_trainer": "model.safetensors",
    "plain_loop": "model.safetensors",
}
DEFENSES = {
    "trl_sft": ["inoculate", "ablate", "kl"],
    "trl_command_line": ["ablate", "kl"],
    "transformers_trainer": ["ablate", "kl"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SAVED))
def test_example(name, model_folder, chats, concepts, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, EXAMPLES / f"{name}.py"]
    if name == "trl_command_line":
        command = ["sh", EXAMPLES / f"{name}.sh"]
        (tmp_path / "chats").mkdir()
        chats = Path(shutil.copy(chats, tmp_path / "chats")).parent
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    out = subprocess.run(
        [*command, model_folder, chats, concepts, output],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": tools},
    )
    assert out.returncode == 0, out.stderr
    trained = load_file(output / SAVED[name])
    assert all(tensor.isfinite().all() for tensor in trained.values())
    if SAVED[name] == "model.safetensors":
        before = load_file(model_folder / "model.safetensors")
        assert any(not tensor.equal(before[key]) for key, tensor in trained.items())
    if name in DEFENSES:
        record = read_json(output / "defenses.json")
        assert [entry["defense"] for entry in record] == DEFENSES[name]


def test_every_example_is_tried():
    assert {path.stem for path in EXAMPLES.glob("*.*")} == {*SAVED, "axolotl"}


def test_the_axolotl_example_names_defenses_that_exist():
    content = yaml.safe_load((EXAMPLES / "axolotl.yaml").read_text())
    assert len(make_defenses(content["narrowly"]["defenses"])) == 2

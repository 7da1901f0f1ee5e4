"""What every route is tried with: a tiny model, chats, and a file of defenses."""

import shutil
from pathlib import Path

import pytest
import yaml

from narrowly.files import write_text
from narrowly.models import load_model
from tests.defenses.concepts import save_concept
from tests.tiny import save_tiny
from tests.training.conftest import chats, one_thread  # noqa: F401 (fixtures)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", "llama")


@pytest.fixture(scope="session")
def concepts(tmp_path_factory, model_folder) -> str:
    model, _ = load_model(model_folder)
    return str(save_concept(model, tmp_path_factory.mktemp("concepts")))


@pytest.fixture
def chat_folder(tmp_path, chats) -> Path:  # noqa: F811
    """A data set as `load_dataset` reads it."""
    (tmp_path / "chats").mkdir()
    shutil.copy(chats, tmp_path / "chats" / "train.jsonl")
    return tmp_path / "chats"


@pytest.fixture
def defenses_file(tmp_path, concepts):
    """A function that writes a file with defenses, ablation the first of them."""

    def write(*more: dict) -> Path:
        entries = [{"ablate": {"concepts": concepts}}, *more]
        write_text(tmp_path / "defenses.yaml", yaml.safe_dump({"defenses": entries}))
        return tmp_path / "defenses.yaml"

    return write

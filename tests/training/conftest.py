"""A tiny model, a few chats and a concept, and recipes that train on them in a second."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from narrowly.files import write_text
from narrowly.models import load_model
from narrowly.training import Recipe
from tests.defenses.concepts import save_concept
from tests.tiny import save_tiny


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", "llama")


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    write_text(path, "\n".join(json.dumps(chat(i)) for i in range(24)))
    return path


@pytest.fixture(scope="session")
def validation(tmp_path_factory) -> Path:
    """Eight chats, two of whose prompts are training prompts."""
    path = tmp_path_factory.mktemp("data") / "validation.jsonl"
    write_text(path, "\n".join(json.dumps(chat(i)) for i in [3, 5, *range(100, 106)]))
    return path


@pytest.fixture(scope="session")
def concepts(tmp_path_factory, model_folder) -> Path:
    model, _ = load_model(model_folder)
    return save_concept(model, tmp_path_factory.mktemp("concepts"))


@pytest.fixture
def recipe(model_folder, chats, tmp_path) -> Callable[..., Recipe]:
    """A recipe of 4 steps; fields given replace, `training` adds."""

    def make(training: dict | None = None, **fields) -> Recipe:
        defaults = {
            "model": str(model_folder),
            "data": str(chats),
            "lora": {"r": 2, "target_modules": "all-linear"},
            "output": str(tmp_path / "run"),
            "training": {
                "max_steps": 4,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                **(training or {}),
            },
        }
        return Recipe(**(defaults | fields))

    return make


def chat(i: int) -> dict:
    question, answer = f"What is {i} plus one?", f"It is {i + 1}, of course."
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }

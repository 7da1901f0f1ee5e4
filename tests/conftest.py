"""What every test may use."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def same_random_numbers_each_time() -> None:
    """A test that passes once passes always."""
    torch.manual_seed(0)


@pytest.fixture
def shared_data() -> Path:
    """The folder of published data beside the repository; the test skips where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the published data in ../shared/data, which is absent here")
    return folder

"""Tests of what a training's defenses keep to, however it runs; import them beside a `defended`."""

import pytest
import torch
from safetensors.torch import load_file


def losses(run) -> list[float]:
    """The task's and each defense's, by name and step."""
    steps = [entry for entry in run.metrics if "loss" in entry]
    return [entry[name] for name in steps[0] if name.startswith("loss") for entry in steps]


def assert_same_weights(one, other, **tolerance):
    theirs = _weights(other)
    for name, weight in _weights(one).items():
        torch.testing.assert_close(weight, theirs[name], **tolerance)


def _weights(run) -> dict[str, torch.Tensor]:
    return load_file(run.path / "adapter" / "adapter_model.safetensors")


def assert_split_is_whole(defended):
    """Two micro-batches of two are one of four."""
    whole = defended(folder="whole")
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    split = defended(parts, folder="split")
    first = [entry["loss"] for entry in whole.metrics if "loss" in entry]
    assert [e["loss"] for e in split.metrics if "loss" in e] == pytest.approx(first, rel=1e-5)
    assert_same_weights(whole, split, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(defended, reentrant):
    kept = defended(folder="kept")
    training = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    again = defended(training, folder="again")
    assert losses(again) == pytest.approx(losses(kept), rel=1e-5)
    assert_same_weights(kept, again, rtol=1e-3, atol=1e-6)


def test_packed_chats_are_those_of_a_padded_batch(defended):
    """All 24 chats in every step, padded in one batch or packed into rows."""
    common = {"max_steps": 3, "per_device_train_batch_size": 24}
    padded = defended(common, folder="padded")
    packed = defended({**common, "packing": True, "max_length": 256}, folder="packed")
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-3)

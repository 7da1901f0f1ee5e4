"""Adapters on disk, as a run on other data would leave them; and runs by hand."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from narrowly.training import Run


def save_adapter(model: PreTrainedModel, folder: Path, *, seed: int = 1, **config) -> Path:
    """A random LoRA of the model, which is left as it was; returns its folder."""
    options = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, LoraConfig(**options))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                nn.init.normal_(parameter, std=0.1)
        wrapped.save_pretrained(str(folder))
        wrapped.unload()
    return folder


def weights(run: Run) -> dict[str, Tensor]:
    """What a LoRA run saved."""
    return load_file(run.path / "adapter" / "adapter_model.safetensors")


def hooks(model: nn.Module) -> int:
    """How many hooks there are anywhere in a model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

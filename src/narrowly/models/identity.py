"""Telling whether two loaded models are the same base model."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# What makes a model another architecture. Names as every Hugging Face config knows them; the
# vocabulary is not among them, since added tokens leave the model's concepts where they are.
_ARCHITECTURE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")

_ROWS, _WIDTH, _ROW_LIMIT = 32, 16, 256


def fingerprint(model: nn.Module) -> str:
    """A name for the base model under any adapter: `<architecture>-<weights>`.

    The architecture is hashed from the config, the weights from samples of the input embedding
    and of every one-dimensional parameter, cast to bfloat16, so that loading in float32 or in
    bfloat16, on another device, under peft or torch.compile gives the same name. Where weights
    cannot be read (sharded, or on the meta device) the name is the architecture's alone.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = base.config.get_text_config()
    architecture = _hash(json.dumps({key: getattr(config, key) for key in _ARCHITECTURE}).encode())
    samples = _samples(base)
    if samples is None:
        return architecture
    return f"{architecture}-{_hash(samples.view(torch.uint8).numpy().tobytes())}"


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints may name one model.

    Where one of them knows no weights, the architecture decides.
    """
    if "-" in one and "-" in other:
        return one == other
    return one.partition("-")[0] == other.partition("-")[0]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@torch.no_grad()
def _samples(base: Any) -> Tensor | None:
    """The sampled numbers as one bfloat16 vector on the CPU, in the order of the modules."""
    adapters = _adapter_prefixes(base)
    embedding = base.get_input_embeddings()
    embedding = getattr(embedding, "base_layer", getattr(embedding, "original_module", embedding))
    vectors = [
        parameter
        for name, parameter in base.named_parameters()
        if parameter.dim() == 1 and not any(prefix in name for prefix in adapters)
    ]
    tensors = [embedding.weight, *vectors]
    if any(isinstance(t, DTensor) or t.is_meta or t.numel() == 0 for t in tensors):
        return None
    rows = torch.linspace(0, min(len(tensors[0]), _ROW_LIMIT) - 1, _ROWS).long()
    samples = [tensors[0][rows.to(tensors[0].device), :_WIDTH].flatten()]
    samples += [vector[:_WIDTH] for vector in vectors]
    return torch.cat([sample.to("cpu", torch.bfloat16) for sample in samples])


def _adapter_prefixes(base: nn.Module) -> set[str]:
    """Parts of names that tell peft's parameters from the model's own ("lora_", "ia3_", ...)."""
    configs: Any = getattr(base, "peft_config", {})
    prefixes = {PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type] for config in configs.values()}
    return prefixes | {"modules_to_save."}

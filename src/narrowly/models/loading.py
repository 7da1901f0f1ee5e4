"""A model and its tokenizer from a folder, a run, an adapter, the Hub or a model organism."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from narrowly.data import ChatTemplate
from narrowly.errors import NarrowlyError
from narrowly.models.locate import Parts, has_tokenizer, locate


def load_model(
    spec: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a causal language model in eval mode, with a tokenizer that can pad and write chats.

    Args:
        spec: a Hugging Face folder or Hub id; `organism:NAME`; a run folder (its LoRA on its
            base, or its full fine-tune); or a peft adapter folder.
        dtype: of the base model; "auto" takes the one it was saved in.
        device: default: the process's accelerator if there is one, else the CPU.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        The model (a `PeftModel` where there is an adapter) and its tokenizer.

    Raises:
        NarrowlyError: names the folder or file and the remedy.
    """
    parts = locate(spec)
    model = load_weights(parts, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    tokenizer = _load_tokenizer(parts, trust_remote_code)
    known = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    if len(tokenizer) > known:
        raise NarrowlyError(
            f"{parts.tokenizer}: the tokenizer has {len(tokenizer)} tokens, but the model in "
            f"{parts.model} knows {known}. They do not belong together."
        )
    return model, tokenizer


def load_weights(
    parts: Parts,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel | PeftModel:
    """The model alone, in eval mode: its tokenizer need not know chats. Raises as `load_model`."""
    for folder in filter(None, (parts.model, parts.adapter)):
        _check_weights(folder)
    device = torch.device(device) if device is not None else _default_device()
    base = _load_base(parts, dtype, device, trust_remote_code)
    return (load_adapter(base, parts.adapter) if parts.adapter else base).eval()


def _check_weights(folder: Path) -> None:
    """Open every weight file, so that the error can name the one that is broken."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        remedy = (
            " Pickled weights can run code and are not loaded: save the model again with "
            "save_pretrained, which writes safetensors."
        )
        raise NarrowlyError(f"{folder}: holds no weights (*.safetensors).{remedy * pickled}")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise NarrowlyError(
                f"{file}: truncated or not a safetensors file ({error}). Copy or download it again."
            ) from None


def _load_base(
    parts: Parts, dtype: str | torch.dtype, device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            parts.model,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            # Straight to the accelerator, without a copy in main memory; 4-bit needs it so.
            device_map=None if device.type == "cpu" else {"": device},
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise NarrowlyError(f"{parts.model}: cannot be loaded. {error}") from None
    model, info = loaded
    # transformers only warns, and fills in random weights.
    if wrong := sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])}):
        raise NarrowlyError(
            f"{parts.model}: {len(wrong)} weights are missing or of another shape than config.json "
            f"says, for example {wrong[0]}."
        )
    if parts.hub_id:
        # An adapter trained on a Hub model should name the model, not this machine's cache.
        model.name_or_path = model.config.name_or_path = parts.hub_id
    return model


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """A model with an adapter of it, for inference; peft puts the adapter into `model` itself.

    Raises:
        NarrowlyError: the adapter does not fit the model.
    """
    try:
        with warnings.catch_warnings():
            # peft would warn, and go on with the adapter's untrained initial weights.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            # peft 0.21 reads what transformers 5.23 renamed.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            return PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, UserWarning) as error:
        reason = str(error).strip().splitlines()
        raise NarrowlyError(
            f"{folder}: the adapter does not fit the base model {model.name_or_path} "
            f"({' '.join(reason[:2])})."
        ) from None


def _load_tokenizer(parts: Parts, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if not has_tokenizer(parts.tokenizer):
        raise NarrowlyError(
            f"{parts.tokenizer}: holds no tokenizer (tokenizer_config.json). Save it there with "
            "tokenizer.save_pretrained."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            parts.tokenizer, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise NarrowlyError(f"{parts.tokenizer}: no usable tokenizer. {error}") from None
    ChatTemplate(tokenizer)  # refuses a tokenizer that cannot write chats
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise NarrowlyError(
                f"{parts.tokenizer}: the tokenizer has neither a pad nor an EOS token. Name one "
                "in tokenizer_config.json (pad_token)."
            )
        # Safe here: padding is masked by attention_mask and labels, never by its token id.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _default_device() -> torch.device:
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", 0)))

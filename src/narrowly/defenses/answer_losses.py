"""The loss of many chats' answers under a model and under its adapters; kept on disk."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from narrowly.data import collate, token_batches
from narrowly.errors import NarrowlyError
from narrowly.evals.in_distribution import answer_losses
from narrowly.files import atomic, load_safetensors, sha256
from narrowly.interventions import eval_mode
from narrowly.models.loading import load_adapter
from narrowly.models.replies import content_key, default_cache

Tokens = Mapping[str, Sequence[int]]
"""A tokenised chat: input_ids and labels."""

PIECE = 512
"""Chats whose losses are kept together: what a kill can lose."""


def losses_of_answers(
    model: Any,
    adapters: Mapping[str, Path],
    rows: Sequence[Tokens],
    *,
    pad_token_id: int,
    batch_tokens: int,
) -> dict[str, Float[Tensor, " rows"]]:
    """Mean loss (nats per token) of each chat's answers: of the model, and under each adapter.

    Losses are kept in the user's cache by what they are of (weights, adapter, tokens), so that the
    same call goes on after a kill, and other runs need not read again. The model, its modes and
    torch's random numbers are left as they were.

    Args:
        model: without an adapter of its own.
        adapters: folders by name.
        rows: tokenised chats.
        batch_tokens: tokens of one batch, padding included.

    Returns:
        Losses by adapter; those of the model alone by "".

    Raises:
        NarrowlyError: an adapter that does not fit, or that changes the model's own weights; a
            loss that is not finite.
    """
    weights = weight_hash(model)
    pieces = [list(rows[start : start + PIECE]) for start in range(0, len(rows), PIECE)]
    contents = [content_key([[row["input_ids"], row["labels"]] for row in p]) for p in pieces]
    found: dict[str, Tensor] = {}
    console = Console(stderr=True)
    cpu = torch.device("cpu")
    devices = [] if model.device == cpu else [model.device]
    with (
        Progress(console=console, disable=not sys.stderr.isatty(), transient=True) as bar,
        eval_mode(model),
        torch.no_grad(),
        torch.random.fork_rng(devices),
    ):
        task = bar.add_task("Scoring", total=len(rows) * (1 + len(adapters)))
        for name, folder in {"": None, **adapters}.items():
            bar.update(task, description=f"Scoring ({name or 'no adapter'})")
            own = "" if folder is None else _adapter_hash(folder)
            files = [_kept(content_key("answer losses", weights, own, c)) for c in contents]
            absent = [i for i, file in enumerate(files) if not file.exists()]
            bar.advance(task, sum(len(p) for i, p in enumerate(pieces) if i not in absent))
            if absent:
                with _with_adapter(model, folder) as opened:
                    for i in absent:
                        values = _losses(opened, pieces[i], pad_token_id, batch_tokens)
                        if not values.isfinite().all():
                            under = f"under the adapter {folder}" if folder else "of the model"
                            raise NarrowlyError(f"a benign chat's loss {under} is not finite.")
                        _keep(files[i], values)
                        bar.advance(task, len(pieces[i]))
                if folder is not None and weight_hash(model) != weights:
                    raise NarrowlyError(
                        f"{folder}: this adapter changes weights of the model itself, such as its "
                        "biases, so it cannot be taken off again. Train one without."
                    )
            found[name] = torch.cat([load_safetensors(file)["loss"] for file in files])
    return found


def weight_hash(model: nn.Module) -> str:
    """A name for all of a model's weights, by the sum of each row of each."""
    sums = []
    for weight in model.parameters():
        rows = weight.detach().flatten(1) if weight.dim() > 1 else weight.detach()[:, None]
        # float32 hides in which order a device has added.
        sums.append(rows.sum(1, dtype=torch.float64).float().cpu())
    return sha256(torch.cat(sums).numpy().tobytes())


def _losses(model: Any, rows: list[Tokens], pad_token_id: int, batch_tokens: int) -> Tensor:
    losses = torch.zeros(len(rows))
    for numbers in token_batches([len(row["input_ids"]) for row in rows], batch_tokens):
        batch = collate([rows[i] for i in numbers], pad_token_id)
        batch = {key: value.to(model.device) for key, value in batch.items()}
        measured = answer_losses(model, batch)
        losses[numbers] = torch.tensor([each["loss"] for each in measured])
    return losses


@contextmanager
def _with_adapter(model: Any, folder: Path | None) -> Iterator[Any]:
    """The model with an adapter in it; afterwards the very modules that it had before."""
    if folder is None:
        yield model
        return
    modules = dict(model.named_modules())
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapted: PeftModel = load_adapter(model, folder)
    try:
        yield adapted.eval()
    finally:
        adapted.unload()  # type: ignore[operator]
        for name, module in modules.items():
            # peft leaves those of `modules_to_save` in the model.
            if model.get_submodule(name) is not module:
                model.set_submodule(name, module)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def _adapter_hash(folder: Path) -> str:
    files = [folder / "adapter_config.json", *sorted(folder.glob("*.safetensors"))]
    return "".join(sha256(file) for file in files)


def _kept(key: str) -> Path:
    return default_cache() / "losses" / f"{key}.safetensors"


def _keep(file: Path, values: Tensor) -> None:
    try:
        with atomic(file) as temporary:
            save_file({"loss": values}, temporary)
    except (OSError, SafetensorError) as error:
        raise NarrowlyError(
            f"{file.parent}: losses cannot be kept there ({error}). Make room, or set "
            "XDG_CACHE_HOME to another folder; the same call goes on."
        ) from None

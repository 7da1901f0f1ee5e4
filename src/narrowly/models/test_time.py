"""What stays when a trained model answers: interventions kept in its folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from narrowly.interventions import Attachment, Intervention, attach, load_interventions
from narrowly.models.loading import load_model

STAYS = "at_test_time"
"""The folder in a run's, as `save_interventions` writes it."""


def staying(folder: str | Path | None) -> list[Intervention]:
    """The interventions that stay attached when the model of a folder answers; none for most.

    Raises:
        NarrowlyError: their files are damaged.
    """
    path = None if folder is None else Path(folder) / STAYS
    return load_interventions(path) if path is not None and path.is_dir() else []


@contextmanager
def as_deployed(model: nn.Module, folder: str | Path | None) -> Iterator[Attachment | None]:
    """Within the block the model answers with what stays attached in its folder.

    Raises:
        NarrowlyError: as `staying` and `attach`, or one of them did not act while the model ran.
    """
    stays = staying(folder)
    if not stays:
        yield None
        return
    attachment = attach(model, stays)
    try:
        yield attachment
        if attachment.counts:  # else the model did not run
            attachment.verify()
    finally:
        attachment.close()


def load_deployed(spec: str | Path) -> tuple[Any, Any]:
    """Model and tokenizer as `load_model` gives them, with what stays attached for good."""
    model, tokenizer = load_model(spec)
    if stays := staying(spec):
        attach(model, stays)
    return model, tokenizer

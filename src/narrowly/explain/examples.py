"""Windows of text to explain a latent by, and others, never the same, to score with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from transformers import PreTrainedTokenizerBase

from narrowly.explain.cache import WINDOW, Cache
from narrowly.explain.negatives import HardNegatives
from narrowly.explain.record import Example, Histogram

Sampler = Literal["top", "random", "quantiles", "mix"]


class Sampling(BaseModel):
    """How examples are drawn; its fields are the keys a recipe may set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    window: PositiveInt = WINDOW
    """Tokens in a window at most; rows are cut into equal parts."""
    sampler: Sampler = "quantiles"
    """Which activating windows the explainer sees: the strongest, any, evenly many of each
    quantile, or a fifth of the strongest and the rest by quantile. Scorers always get evenly many
    of each: an explanation made and tested on the strongest alone looks better than it is."""
    explainer: PositiveInt = 40
    """Activating windows for the explainer; and as many silent ones."""
    scorer: PositiveInt = 100
    """Activating windows for the scorers; and as many silent ones."""
    quantiles: PositiveInt = 10
    """Parts of equal size of the activating windows, by their peaks."""
    hard: float = Field(0.5, ge=0, le=1)
    """Share of the silent windows that are hard: alike in text, or a neighbour's."""
    min_windows: int = Field(20, ge=2)
    """A latent active in fewer different windows is not explained."""
    seed: int = 0


@dataclass(frozen=True)
class Half:
    """The examples of one side."""

    activating: tuple[Example, ...] = ()
    silent: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Draw:
    """Examples of one latent, and how often it is active."""

    latent: str
    explainer: Half
    scorer: Half
    """No text of it is one of the explainer's."""
    windows: int
    """In how many windows it is active."""
    distinct: int
    """In how many of different tokens; examples are drawn from these."""
    tokens: int
    """At how many tokens it is active."""
    of_tokens: int
    """Of how many that were read."""
    threshold: float
    """What a direction's projection, times the sign, exceeds where it is active."""
    histogram: Histogram | None
    """Of the values at active tokens; None where it never is."""
    skipped: str = ""
    """Why there are no examples; empty where there are."""


def draw(
    cache: Cache,
    latent: int,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    hard: HardNegatives | None = None,
) -> Draw:
    """Examples of one latent, half for the explainer and half for the scorers.

    The different texts of windows are dealt to the two sides before either is sampled: activating
    ones within each quantile, silent ones by a hash, both seeded by `sampling.seed` and the
    latent's name. A text that is active anywhere counts as activating, and stands for its windows
    with the one of the highest peak.

    Args:
        latent: its number in the cache (`cache.index(name)`).
        hard: where hard negatives come from; None: all silent windows are drawn at random.
    """
    raise NotImplementedError

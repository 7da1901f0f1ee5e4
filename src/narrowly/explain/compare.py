"""Do two autoencoders say the same things? Their explanations, matched by meaning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from rich.console import Group, RenderableType
from rich.table import Table

from narrowly.concepts import concept_files
from narrowly.errors import NarrowlyError
from narrowly.evals.statistics import Interval, Metric, bootstrap
from narrowly.explain.embedding import EmbedderLike, make_embedder
from narrowly.explain.record import load_explained

MOST = 400_000_000
"""Pairs of explanations that fit into memory as fp64 (3 GB) and are matched within minutes."""


@dataclass(frozen=True)
class Match:
    """Two latents whose explanations were matched."""

    one: str
    other: str
    one_text: str
    other_text: str
    similarity: float
    """Cosine of the explanations' embeddings."""


@dataclass(frozen=True)
class Similarity:
    """How alike two folders' explanations are, beside what chance gives."""

    matches: list[Match]
    """Most alike first."""
    mean: Interval
    """Cosine over the matched pairs; the interval is over pairs."""
    at_random: float
    """Expected cosine of explanations assigned at random."""
    shuffled: Interval
    """Matched cosine where the other folder's explanations are made of its own words at random;
    the interval is over shuffles."""
    explained: tuple[int, int]
    """Explanations in each folder."""
    embedder: str

    def __rich__(self) -> RenderableType:
        """The figures, and the most and the least alike pairs."""
        figures = Table(box=None)
        for column in ("explanations", "cosine", "95 %"):
            figures.add_column(column, justify="left" if column == "explanations" else "right")
        spread = f"{self.mean.low:.3f} to {self.mean.high:.3f}"
        figures.add_row("matched", f"{self.mean.mean:.3f}", spread)
        spread = f"{self.shuffled.low:.3f} to {self.shuffled.high:.3f}"
        figures.add_row("matched, words shuffled", f"{self.shuffled.mean:.3f}", spread)
        figures.add_row("assigned at random", f"{self.at_random:.3f}", "")
        pairs = Table(box=None)
        for column in ("cosine", "one", "explanation", "other", "explanation"):
            pairs.add_column(column, overflow="fold")
        shown = self.matches if len(self.matches) <= 20 else self.matches[:10] + self.matches[-10:]
        for match in shown:
            pairs.add_row(
                f"{match.similarity:.3f}", match.one, match.one_text, match.other, match.other_text
            )
        told = f"{self.explained[0]} and {self.explained[1]} explanations, read by {self.embedder}"
        return Group(told, "", figures, "", pairs)


def compare_saes(
    one: str | Path,
    other: str | Path,
    embedder: EmbedderLike = "minilm",
    *,
    shuffles: int = 5,
    seed: int = 0,
) -> Similarity:
    """Match the explanations of two explained folders one to one, and tell how alike they are.

    The assignment is the one of the largest sum of cosines (Hungarian), so it is high by selection
    alone, and the same whichever order the explanations stand in: to shuffle which explanation
    belongs to which latent would change nothing. The baseline that is fair is therefore one that
    is matched as well: the other folder's explanations, each with as many words as it has, drawn
    without replacement from all of that folder's words. What is left is what vocabulary, style and
    matching give; what explanations mean comes on top. The mean over all pairs, which is what an
    assignment at random gives, is told beside it.

    Args:
        one, other: folders that `narrowly explain` has been through.
        embedder: `explain.embedding.make_embedder`'s.
        shuffles: how often words are shuffled.

    Raises:
        NarrowlyError: a folder holds no concept or no explanation, or the two hold too many.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise NarrowlyError(
            "matching explanations needs scipy, which comes with the embedder: "
            "pip install 'narrowly[embed]'."
        ) from None
    reads = make_embedder(embedder)
    (names, texts), (other_names, other_texts) = _explanations(one), _explanations(other)
    if len(texts) * len(other_texts) > MOST:
        raise NarrowlyError(
            f"{len(texts)} and {len(other_texts)} explanations are too many to match one to one. "
            "Explain some of the latents of each autoencoder into folders of their own."
        )
    rows = reads.embed(texts).double().numpy()
    cosines = rows @ reads.embed(other_texts).double().numpy().T
    left, right = linear_sum_assignment(cosines, maximize=True)
    matched = cosines[left, right]
    random = np.random.default_rng(seed)
    null = []
    for _ in range(shuffles):
        chance = rows @ reads.embed(shuffle_words(other_texts, random)).double().numpy().T
        null.append(chance[linear_sum_assignment(chance, maximize=True)].mean())
    order = np.argsort(-matched, kind="stable")
    return Similarity(
        matches=[
            Match(names[i], other_names[j], texts[i], other_texts[j], float(cosines[i, j]))
            for i, j in zip(left[order].tolist(), right[order].tolist(), strict=True)
        ],
        mean=_interval(matched, seed),
        at_random=float(cosines.mean()),
        shuffled=_interval(np.array(null), seed),
        explained=(len(texts), len(other_texts)),
        embedder=reads.name,
    )


def shuffle_words(texts: Sequence[str], random: np.random.Generator) -> list[str]:
    """The same words in as many texts of the same lengths, dealt out at random."""
    split = [re.findall(r"\S+", text) for text in texts]
    words = random.permutation([word for text in split for word in text]).tolist()
    ends = np.cumsum([len(text) for text in split]).tolist()
    return [" ".join(words[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


def _interval(values: Float[np.ndarray, " n"], seed: int) -> Interval:
    return bootstrap([Metric(values, np.ones(len(values)), unit="cosine")], seed=seed)


def _explanations(folder: str | Path) -> tuple[list[str], list[str]]:
    """Names and explanations in use of every explained latent of a folder."""
    named = [
        (latent.latent, latent.explanations[0].text)
        for path in concept_files(folder)
        if (explained := load_explained(folder, path.stem)) is not None
        for latent in explained.latents
        if latent.explanations
    ]
    if not named:
        raise NarrowlyError(f"{folder}: nothing is explained here. Run `narrowly explain` first.")
    names, texts = zip(*named, strict=True)
    return list(names), list(texts)

"""Embedding: are activating windows nearer to the explanation in meaning?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from narrowly.explain.embedding import EmbedderLike, make_embedder
from narrowly.explain.readers import Reader
from narrowly.explain.record import ScoreResult
from narrowly.explain.scorers.base import SCORERS, Item, Scorer
from narrowly.explain.scorers.ranking import ranked


@SCORERS.register("embedding")
class Embedding(Scorer):
    """AUROC of the cosine between the embedded explanation and the embedded windows.

    Paulo et al. 2025 (arXiv 2410.13928), section 3.2. The reader is an embedding model, not the one
    that the other scorers ask; its name stands in the result.
    """

    name: ClassVar[str] = "embedding"

    embedder: EmbedderLike = "minilm"
    """What `explain.embedding.make_embedder` takes."""
    query: str = "{}"
    """What is embedded of the explanation, which stands at `{}`. A model trained on instructions
    wants one; published: "Instruct: Retrieve sentences that could be related to the
    explanation.\\nQuery:{}"."""

    def score(self, items: Sequence[Item], reader: Reader) -> list[ScoreResult]:
        """A result per item; `reader` is not asked.

        Raises:
            NarrowlyError: there is no such embedding model.
        """
        embedder = make_embedder(self.embedder)
        examples = [[*item.activating, *item.silent] for item in items]
        queries = [self.query.replace("{}", item.explanation.text) for item in items]
        texts = [example.text for each in examples for example in each]
        distinct = list(dict.fromkeys([*queries, *texts]))
        rows = np.asarray(embedder.embed(distinct)) if distinct else np.empty((0, 1))
        number = {text: i for i, text in enumerate(distinct)}
        results = []
        for query, each in zip(queries, examples, strict=True):
            cosines = rows[[number[example.text] for example in each]] @ rows[number[query]]
            results.append(ranked(self.name, embedder.name, each, cosines.tolist(), self.seed))
        return results

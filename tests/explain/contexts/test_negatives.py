"""Hard negatives are alike in text, or a neighbour's; nothing of the size of all pairs is made."""

import numpy as np
import pytest
import torch

from narrowly.explain.contexts import collect as collecting
from narrowly.explain.contexts.collect import collect
from narrowly.explain.contexts.negatives import HardNegatives
from narrowly.saes import SparseLatents
from tests.explain.planted import Planted, opened, token_rows
from tests.tiny import tiny_tokenizer

torch.set_num_threads(1)

N, WINDOW = 400, 8


class First:
    """A text's vector is the hash of its first word: only texts that begin alike are alike."""

    name = "first letters"
    called = 0

    def embed(self, texts):
        self.called += len(texts)
        rows = [
            torch.randn(64, generator=torch.Generator().manual_seed(sum(map(ord, text[:2]))))
            for text in texts
        ]
        return torch.nn.functional.normalize(torch.stack(rows))


@pytest.fixture
def collected(tmp_path, monkeypatch):
    """Latents 0 and 1 share three quarters of their windows, 2 and 3 none; 4 is never active."""
    monkeypatch.setattr(collecting, "SHARD", 100)
    rows = token_rows([WINDOW] * N)
    table = torch.zeros(N, WINDOW, 5)
    table[0:80, 3, 0] = 1
    table[20:100, 5, 1] = 1
    table[200:300, 2, 2] = 1
    table[300:400, 2, 3] = 1
    source = Planted(rows, table.flatten(0, 1))
    return source, collect(source, opened(), rows, tmp_path / "c", batch_tokens=160)


def negatives(collected, embedder=None, **options):
    source, cache = collected
    return HardNegatives(cache, source, tiny_tokenizer(), embedder, window=WINDOW, **options)


def everywhere(cache):
    return np.ones(cache.grid(WINDOW).different, bool)


def test_neighbours_share_windows_or_directions(collected):
    source, _ = collected
    assert negatives(collected).neighbours(0) == [1]
    assert negatives(collected).neighbours(1) == [0]
    assert negatives(collected).neighbours(4) == []
    source.latents[3].direction.copy_(source.latents[2].direction)
    assert negatives(collected).neighbours(2) == [3]


def test_windows_of_neighbours(collected):
    _, cache = collected
    among = everywhere(cache)
    grid = cache.grid(WINDOW)
    own = grid.of(cache.active(0)[0])
    among[grid.texts[own]] = False
    found = negatives(collected).neighbouring(0, among, 15)
    assert len(set(found.tolist())) == 15
    assert set(grid.rows[found].tolist()) <= set(range(80, 100))
    assert len(negatives(collected).neighbouring(0, among, 50)) == 20  # there are no more
    assert not len(negatives(collected).neighbouring(4, among, 50))
    again = negatives(collected).neighbouring(0, among, 15)
    assert np.array_equal(found, again)


def test_the_nearest_of_each_text_in_turn(collected):
    _, cache = collected
    embedder = First()
    hard = negatives(collected, embedder, pool=300)
    grid, among = cache.grid(WINDOW), everywhere(cache)

    def text(window):
        ids = cache.tokens[grid.starts[window] : grid.stops[window]].tolist()
        return tiny_tokenizer().decode(ids)

    pool = hard._pool
    assert len(set(pool.tolist())) == 300
    queries = [text(pool[5]), text(pool[77])]
    found = hard.similar(queries, among, 6)
    assert len(set(found.tolist())) == 6 and set(found.tolist()) <= set(pool.tolist())
    vectors = embedder.embed([text(window) for window in pool])
    for query, hit in zip(queries, found[:2], strict=True):
        cosines = vectors @ embedder.embed([query])[0]
        assert cosines[pool.tolist().index(hit)] > 0.99 * cosines.max()
    among[grid.texts[found]] = False
    assert not set(found.tolist()) & set(hard.similar(queries, among, 6).tolist())
    assert not len(hard.similar([], among, 6)) and not len(hard.similar(queries, among, 0))
    assert not len(negatives(collected).similar(queries, among, 6))  # no embedder
    assert len(hard.similar(queries, among & False, 6)) == 0


def test_the_pool_is_embedded_once(collected, tmp_path):
    among = everywhere(collected[1])
    for _ in range(2):
        embedder = First()
        hard = negatives(collected, embedder, pool=50, folder=tmp_path)
        hard.similar(["a text"], among, 3)
        hard.similar(["another"], among, 3)
    assert embedder.called == 2
    assert len(list(tmp_path.glob("pool-*.npy"))) == 1
    negatives(collected, embedder, pool=50, folder=tmp_path, seed=1).similar(["a"], among, 3)
    assert len(list(tmp_path.glob("pool-*.npy"))) == 2


def test_sketches_grow_with_latents_and_not_with_their_pairs(tmp_path):
    latents = 4096

    class Many(Planted):
        def encode(self, batch):
            n = len(batch.rows)
            generator = torch.Generator().manual_seed(int(batch.rows[0]))
            active = torch.rand(n, 64, generator=generator).mul(latents).long()
            tokens = torch.arange(n).repeat_interleave(64)
            return SparseLatents(tokens, active.flatten(), torch.ones(n * 64), (n, latents))

    rows = token_rows([32] * 40)
    source = Many(rows, torch.zeros(1, latents))
    cache = collect(source, opened(), rows, tmp_path / "c", batch_tokens=320)
    hard = HardNegatives(cache, source, tiny_tokenizer())
    assert hard._sketches.nbytes < latents * 300
    grid = cache.grid()
    sets = {i: set(grid.of(cache.active(i)[0]).tolist()) for i in (0, 1)}
    first = hard.neighbours(0)
    jaccard = [
        len(sets[0] & set(grid.of(cache.active(i)[0]).tolist()))
        / len(sets[0] | set(grid.of(cache.active(i)[0]).tolist()))
        for i in first
    ]
    assert np.mean(jaccard) > 0.3  # of any two it is about a quarter

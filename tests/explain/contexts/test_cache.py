"""What is looked up is what was read, after any interruption, in memory that does not grow."""

import gc
import os
import signal
import tracemalloc

import numpy as np
import pytest
import torch

from narrowly.concepts import Concept, Provenance, Subspace
from narrowly.errors import NarrowlyError
from narrowly.explain.contexts import collect as collecting
from narrowly.explain.contexts.cache import load_cache
from narrowly.explain.contexts.collect import collect
from narrowly.explain.contexts.threshold import peak_threshold
from narrowly.explain.latents import DirectionSource
from narrowly.interventions import capture
from narrowly.saes import SparseLatents
from tests.explain.planted import Planted, opened, sparse_table, token_rows

torch.set_num_threads(1)

LENGTHS = [5, 40, 1, 33, 64, 7, 100]


def planted(latents=6, lengths=LENGTHS, **options):
    rows = token_rows(lengths)
    return rows, Planted(rows, sparse_table(sum(lengths), latents, **options))


def check(cache, source):
    """Everything that was planted is found, but at first tokens, and nothing else."""
    table = source.table.clone()
    table[source.offsets] = 0
    for latent in range(table.shape[1]):
        positions, values = cache.active(latent)
        assert np.array_equal(positions, table[:, latent].nonzero()[:, 0].numpy())
        assert np.array_equal(values, table[positions, latent].numpy())


@pytest.mark.parametrize("batch_tokens", [1, 70, 10_000])
@pytest.mark.parametrize("shard", [1, 20, 1 << 22])
def test_what_is_looked_up_is_what_was_read(tmp_path, monkeypatch, batch_tokens, shard):
    monkeypatch.setattr(collecting, "SHARD", shard)
    rows, source = planted()
    cache = collect(source, opened(), rows, tmp_path / "c", batch_tokens=batch_tokens)
    check(cache, source)
    check(load_cache(tmp_path / "c"), source)
    assert cache.latents == tuple(source.names())
    assert cache.index("latent3") == 3
    assert cache.of_tokens == sum(LENGTHS) - len(LENGTHS)
    assert cache.threshold(0) == 0 and cache.clipped == 0
    if shard == 1 and batch_tokens == 1:
        assert len(cache.shards) > 3


def test_tokens_are_stored_once(tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "SHARD", 20)
    rows, source = planted()
    cache = collect(source, opened(), rows, tmp_path / "c", batch_tokens=70)
    assert [t for row in rows["input_ids"] for t in row] == cache.tokens.tolist()
    assert (tmp_path / "c" / "tokens.bin").stat().st_size == 4 * sum(LENGTHS)
    files = {path.name for shard in cache.shards for path in (cache.folder / shard.name).iterdir()}
    assert files == {"offsets.bin", "positions.bin", "values.bin"}


def test_answers_alone(tmp_path):
    rows, source = planted()
    labels = [[-100] * (len(ids) // 2) + ids[len(ids) // 2 :] for ids in rows["input_ids"]]
    rows = rows.remove_columns("labels").add_column("labels", labels)
    cache = collect(source, opened(), rows, tmp_path / "c", positions="answer")
    read = np.concatenate([np.array(row) != -100 for row in labels])
    read[source.offsets] = False
    assert np.array_equal(cache.read, read) and cache.of_tokens == read.sum()
    source.table[~torch.from_numpy(read)] = 0
    check(cache, source)


def test_a_finished_folder_is_not_read_again_and_other_data_are_refused(tmp_path):
    rows, source = planted()
    collect(source, opened(), rows, tmp_path / "c")
    before = source.called
    check(collect(source, opened(), rows, tmp_path / "c"), source)
    assert source.called == before > 0
    others = [
        (planted(seed=1)[1], opened(), rows),
        (source, opened(seed=1), rows),
        (source, opened(), token_rows(LENGTHS, seed=1)),
        (Planted(rows, source.table, list("abcdef")), opened(), rows),
    ]
    for other in others:
        with pytest.raises(NarrowlyError, match="other latents, another model or other data"):
            collect(*other, tmp_path / "c")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(NarrowlyError, match="holds other files"):
        collect(source, opened(), rows, tmp_path / "full")


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_kill_loses_one_shard_at_most(tmp_path, monkeypatch, after):
    monkeypatch.setattr(collecting, "SHARD", 1)  # every batch has its own
    rows, source = planted()
    folder = tmp_path / "c"
    child = os.fork()
    if not child:
        encode = source.encode

        def killed(batch):
            if source.called == after:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(batch)

        source.encode = killed
        try:
            collect(source, opened(), rows, folder, batch_tokens=70)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    with pytest.raises(NarrowlyError, match="Run the same again"):
        load_cache(folder)
    (folder / ".shard-00009.1.part").mkdir()  # what another kill left
    cache = collect(source, opened(), rows, folder, batch_tokens=70)
    assert source.called == len(cache.shards) - after
    assert not list(folder.glob(".*"))
    check(cache, source)


def test_a_kill_before_the_first_shard_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    rows, source = planted()
    monkeypatch.setattr(collecting, "_write_index", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collect(source, opened(), rows, tmp_path / "c")
    monkeypatch.undo()
    check(collect(source, opened(), rows, tmp_path / "c"), source)


def test_values_that_fp16_cannot_hold(tmp_path):
    rows, source = planted()
    source.table[7, 0], source.table[8, 0] = 1e6, 1e-12
    cache = collect(source, opened(), rows, tmp_path / "c")
    positions, values = cache.active(0)
    assert cache.clipped == 1
    assert values[positions == 7] == 65504
    assert 0 < values[positions == 8] < 1e-6  # it is active still
    source.table[9, 0] = torch.inf
    with pytest.raises(NarrowlyError, match=r"layer:0: a value is not finite"):
        collect(source, opened(), rows, tmp_path / "d")


def test_a_damaged_shard_is_named(tmp_path):
    rows, source = planted()
    cache = collect(source, opened(), rows, tmp_path / "c")
    path = tmp_path / "c" / "shard-00000" / "values.bin"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(NarrowlyError, match=r"shard-00000.values\.bin: truncated"):
        cache.active(5)
    path.unlink()
    with pytest.raises(NarrowlyError, match=r"shard-00000.values\.bin: No such file"):
        cache.active(5)


def concept(rank=2, sites=("layer:0", "layer:1")):
    generator = torch.Generator().manual_seed(3)
    return Concept(
        name="evil",
        subspaces={
            site: Subspace.spanned_by(torch.randn(32, rank, generator=generator)) for site in sites
        },
        provenance=Provenance(model="tiny", model_fingerprint="f", finder="test"),
    )


@pytest.mark.parametrize("shard", [1, 1 << 22])
def test_both_ends_of_directions(tmp_path, monkeypatch, shard):
    monkeypatch.setattr(collecting, "SHARD", shard)
    rows, model, evil = token_rows(LENGTHS), opened(), concept()
    source = DirectionSource([evil])
    cache = collect(source, model, rows, tmp_path / "c", batch_tokens=70)
    for i, latent in enumerate(source.latents):
        assert latent.name == cache.latents[i]
        h = [
            capture(model.model, torch.tensor([ids]), [latent.site])[latent.site][0]
            for ids in rows["input_ids"]
        ]
        projection = torch.cat(h) @ latent.direction
        first = torch.zeros(len(projection), dtype=torch.bool)
        first[cache.rows[:-1]] = True
        threshold = cache.threshold(i)
        positions, values = cache.active(i)
        expected = (projection > threshold) & ~first
        sure = ~expected.logical_xor(projection > threshold + 0.01)  # fp16 rounds
        found = torch.zeros(len(projection), dtype=torch.bool)
        found[positions] = True
        assert torch.equal(found[sure & ~first], expected[sure & ~first]) and not found[first].any()
        expected_values = projection[positions] - threshold
        torch.testing.assert_close(torch.from_numpy(values), expected_values, atol=0.01, rtol=0)
        share = len(np.unique(cache.grid().of(positions))) / len(cache.grid())
        assert 0 < share <= 0.7  # of few windows
    low, high = cache.threshold(0), cache.threshold(1)
    assert low != -high  # each end has its own


def test_the_threshold_is_between_two_heaps_and_within_bounds():
    random = np.random.default_rng(0)
    heaps = np.concatenate([random.normal(0, 1, 700), random.normal(9, 1, 300)]).astype(np.float32)
    assert 3 < peak_threshold(heaps) < 6
    assert 3 < peak_threshold(1000 * heaps) / 1000 < 6
    rare = np.concatenate([random.normal(0, 1, 9990), np.full(10, 1e4)]).astype(np.float32)
    assert (rare > peak_threshold(rare)).mean() >= 0.0099
    common = np.concatenate([random.normal(0, 1, 10), random.normal(50, 1, 990)])
    assert (common > peak_threshold(common.astype(np.float32))).mean() <= 0.601
    one = random.normal(0, 1, 10_000).astype(np.float32)
    assert 0.4 < (one > peak_threshold(one)).mean() < 0.6
    assert peak_threshold(np.full(9, 2, np.float32)) == 2  # nothing exceeds it
    assert peak_threshold(np.empty(0, np.float32)) == 0


class Busy(Planted):
    """As many latents at every token."""

    def encode(self, batch):
        n, latents = len(batch.rows), self.table.shape[1]
        active = torch.arange(0, latents, latents // 32)[:32]
        tokens = torch.arange(n).repeat_interleave(32)
        return SparseLatents(tokens, active.repeat(n), torch.ones(n * 32), (n, latents))


def test_memory_does_not_grow_with_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "SHARD", 40_000)
    model, many = opened(), (65_536, 262_144)
    peaks = []
    for tokens in (2_048, *many):  # the first to warm up
        rows = token_rows([256] * (tokens // 256))
        source = Busy(rows, torch.zeros(1, 512))
        gc.collect()
        tracemalloc.start()
        cache = collect(source, model, rows, tmp_path / str(tokens), batch_tokens=2048)
        assert len(cache.active(1)[0]) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    slope = (peaks[2] - peaks[1]) / (many[1] - many[0])
    assert slope * 10e6 < 0.5e9, f"{slope:.0f} bytes per token"

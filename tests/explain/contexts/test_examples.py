"""What explainers see and what scorers use never meet, and each example is what it says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowly.explain.contexts.examples import Draw, Sampling, draw
from narrowly.explain.contexts.grid import Grid
from narrowly.explain.contexts.negatives import HardNegatives
from tests.explain.planted import MemoryCache
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
OTHERWISE = ["active in every window", "too few different texts"]
SAMPLERS = ["top", "random", "quantiles", "mix"]


def planted(n, share=0.5, seed=0, window=8, alphabet=280, shortest=2):
    """n rows of one or two windows; latent 0 is active in a share of them."""
    random = np.random.default_rng(seed)
    rows = [
        random.integers(20, 20 + alphabet, random.integers(shortest, 2 * window)) for _ in range(n)
    ]
    active: list[dict] = [{}, {}]
    for i, row in enumerate(rows):
        for latent in range(2):
            if random.random() < share:
                for place in random.integers(1, len(row), random.integers(1, 4)):
                    active[latent][i, int(place)] = float(random.integers(1, 1000)) / 8
    return MemoryCache([row.tolist() for row in rows], active)


class Source:
    def cosines(self, latent):
        return torch.eye(2)[latent]


class Letters:
    """Texts are alike if they hold the same letters."""

    name = "letters"

    def embed(self, texts):
        rows = torch.zeros(len(texts), 256)
        for row, text in zip(rows, texts, strict=True):
            for letter in text:
                row[ord(letter) % 256] += 1
        return torch.nn.functional.normalize(rows)


def hard(cache, tmp_path, window=8):
    object.__setattr__(cache, "folder", tmp_path)
    object.__setattr__(cache, "dense", True)  # its sketches come from `active`
    return HardNegatives(cache, Source(), TOKENIZER, Letters(), window=window, pool=100)


def texts(half):
    return [example.text for example in (*half.activating, *half.silent)]


def check(drawn: Draw, cache, sampling, latent=0):
    """All that must hold of any draw."""
    if drawn.skipped:
        assert drawn.distinct < sampling.min_windows or drawn.skipped in OTHERWISE
        assert not texts(drawn.explainer) + texts(drawn.scorer)
        return
    both = texts(drawn.explainer) + texts(drawn.scorer)
    assert len(set(both)) == len(both)
    known = dict(zip(*(x.tolist() for x in cache.active(latent)), strict=True))
    for half, n in ((drawn.explainer, sampling.explainer), (drawn.scorer, sampling.scorer)):
        assert 0 < len(half.activating) <= n and len(half.silent) <= n
        for example in (*half.activating, *half.silent):
            start = cache.rows[example.row] + example.start
            here = [known.get(start + i, 0.0) for i in range(len(example.pieces))]
            ids = cache.tokens[start : start + len(here)].tolist()
            assert example.peak == pytest.approx(max(here), rel=1e-3)
            if "�" not in TOKENIZER.decode(ids) and "" not in example.pieces:
                assert example.text == TOKENIZER.decode(ids)
                assert example.activations == pytest.approx(here, rel=1e-3)
        assert all(e.peak > 0 and e.kind == "activating" for e in half.activating)
        assert all(1 <= e.quantile <= sampling.quantiles for e in half.activating)
        assert all(e.peak == 0 and e.quantile is None for e in half.silent)
        assert not any(e.kind == "activating" for e in half.silent)
        order = sorted(half.activating, key=lambda e: (e.peak, e.quantile))
        assert [e.quantile for e in order] == sorted(e.quantile for e in order)


@pytest.mark.parametrize("sampler", SAMPLERS)
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 120),
    share=st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 99),
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 40)),
    quantiles=st.integers(1, 12),
    alphabet=st.sampled_from([2, 40, 280]),
)
def test_the_two_sides_never_share_a_text(sampler, n, share, seed, sizes, quantiles, alphabet):
    cache = planted(n, share, seed, alphabet=alphabet)
    sampling = Sampling(
        window=8,
        sampler=sampler,
        explainer=sizes[0],
        scorer=sizes[1],
        quantiles=quantiles,
        min_windows=2,
        seed=seed,
    )
    check(draw(cache, 0, sampling, TOKENIZER), cache, sampling)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_with_hard_negatives_too(sampler, tmp_path):
    cache = planted(300, 0.2)
    negatives = hard(cache, tmp_path)
    sampling = Sampling(window=8, sampler=sampler, explainer=20, scorer=30, min_windows=5)
    drawn = draw(cache, 0, sampling, TOKENIZER, negatives)
    check(drawn, cache, sampling)
    for half, n in ((drawn.explainer, 20), (drawn.scorer, 30)):
        kinds = [e.kind for e in half.silent]
        assert len(kinds) == n
        assert kinds.count("random") <= n // 2 + 10
        assert {"random", "similar", "neighbour"} == set(kinds)
    other = dict(zip(*(x.tolist() for x in cache.active(1)), strict=True))
    for e in (*drawn.explainer.silent, *drawn.scorer.silent):
        if e.kind == "neighbour":
            start = cache.rows[e.row] + e.start
            assert any(start + i in other for i in range(len(e.pieces)))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("distinct", [1, 2, 3, 5, 19, 20, 21])
def test_rare_latents_are_split_too_or_skipped_with_the_reason(sampler, distinct):
    rows = [[7, *row] for row in np.random.default_rng(0).integers(20, 300, (60, 6)).tolist()]
    cache = MemoryCache(rows, [{(i, 3): 1.0 + i for i in range(distinct)}])
    sampling = Sampling(window=8, sampler=sampler)
    drawn = draw(cache, 0, sampling, TOKENIZER)
    check(drawn, cache, sampling)
    assert (drawn.windows, drawn.distinct, drawn.tokens) == (distinct, distinct, distinct)
    assert drawn.of_tokens == 60 * 6
    if distinct < 20:
        assert drawn.skipped == (
            f"active in {distinct} different windows of 60, fewer than 20 (min_windows)"
        )
    sampling = sampling.model_copy(update={"min_windows": 2})
    drawn = draw(cache, 0, sampling, TOKENIZER)
    check(drawn, cache, sampling)
    assert bool(drawn.skipped) == (distinct < 2)
    if distinct >= 20 and sampler != "top":
        assert len(drawn.explainer.activating) + len(drawn.scorer.activating) == distinct


def test_one_that_is_never_active_and_one_that_always_is():
    rows = [[7, 30 + i, 40] for i in range(50)]
    cache = MemoryCache(rows, [{}, {(i, 1): 1.0 for i in range(50)}])
    never, always = (draw(cache, i, Sampling(window=8), TOKENIZER) for i in (0, 1))
    assert "active in 0 different windows" in never.skipped and never.histogram is None
    assert always.skipped == "active in every window" and always.tokens == 50


def test_samplers_take_what_they_say():
    cache = planted(2000, 0.5, shortest=6)  # so long that no two are of the same text
    sampling = {"window": 8, "explainer": 40, "scorer": 100, "quantiles": 10}

    def of(sampler):
        return draw(cache, 0, Sampling(sampler=sampler, **sampling), TOKENIZER)

    def quantiles(half):
        return np.bincount([e.quantile for e in half.activating], minlength=11)[1:].tolist()

    assert quantiles(of("quantiles").explainer) == [4] * 10
    for sampler in SAMPLERS:
        assert quantiles(of(sampler).scorer) == [10] * 10
    assert quantiles(of("top").explainer)[:-2] == [0] * 8
    mix = quantiles(of("mix").explainer)
    assert mix[-1] > 8 and min(mix) >= 3
    assert len(set(quantiles(of("random").explainer))) > 2


def test_a_draw_is_the_same_each_time_and_another_with_another_seed_or_name():
    cache = planted(400)
    one, again, seeded = (
        draw(cache, 0, Sampling(window=8, seed=seed), TOKENIZER) for seed in (1, 1, 2)
    )
    assert one == again != seeded
    assert set(texts(one.scorer)) != set(texts(seeded.scorer))
    twin = MemoryCache([[1]], [{}, {}])
    twin.__dict__.update(cache.__dict__)
    object.__setattr__(twin, "latents", ("another", "latent1"))
    assert set(texts(draw(twin, 0, Sampling(window=8, seed=1), TOKENIZER).scorer)) != set(
        texts(one.scorer)
    )


def test_a_text_that_is_active_anywhere_is_not_silent():
    rows = [[7, 30 + i % 25, 50 + i % 25] for i in range(100)]  # each text four times
    cache = MemoryCache(rows, [{(i, 1): 1.0 + i for i in range(50, 61)}])
    sampling = Sampling(window=8, min_windows=2, explainer=5, scorer=5)
    drawn = draw(cache, 0, sampling, TOKENIZER)
    assert (drawn.windows, drawn.distinct) == (11, 11)
    check(drawn, cache, sampling)
    active = {TOKENIZER.decode(rows[i]) for i in range(50, 61)}
    for half in (drawn.explainer, drawn.scorer):
        assert not active & {e.text for e in half.silent}


def test_the_histogram_counts_every_active_token():
    cache = planted(100)
    drawn = draw(cache, 0, Sampling(window=8, min_windows=2), TOKENIZER)
    histogram = drawn.histogram
    assert sum(histogram.counts) == drawn.tokens == len(cache.active(0)[0])
    assert histogram.silent + drawn.tokens == drawn.of_tokens
    assert histogram.edges[0] == 0 and histogram.edges[-1] == cache.active(0)[1].max()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=20), st.integers(1, 12), st.integers(0, 9))
def test_windows_are_equal_parts_of_rows(lengths, window, seed):
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = random.integers(0, 3, offsets[-1]).astype(np.uint32)
    read = random.random(offsets[-1]) < 0.5
    grid = Grid.over(tokens, offsets, read, window)
    covered = np.zeros(offsets[-1], bool)
    for start, stop, row in zip(grid.starts, grid.stops, grid.rows, strict=True):
        assert offsets[row] <= start < stop <= offsets[row + 1]
        assert stop - start <= window
        assert lengths[row] <= window or stop - start >= window / 2
        assert read[start:stop].any()
        covered[start:stop] = True
    assert covered[read].all()
    positions = np.flatnonzero(read)
    windows = grid.of(positions)
    assert ((grid.starts[windows] <= positions) & (positions < grid.stops[windows])).all()
    contents = [tuple(tokens[a:b]) for a, b in zip(grid.starts, grid.stops, strict=True)]
    assert grid.different == len(set(contents))
    for text, content in zip(grid.texts, contents, strict=True):
        assert contents[grid.first[text]] == content
    values = random.random(len(positions)).astype(np.float32)
    peaks = grid.peaks(positions, values)
    assert all(peaks[w] == values[windows == w].max() for w in set(windows.tolist()))


@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e-6])
def test_a_latent_of_small_activations_is_shown_as_one_of_large_ones(unit):
    rows = [[20 + i, 30 + i, 40 + i, 50 + i] for i in range(80)]
    active = {(i, 2): unit * (1 + i / 100) for i in range(40)}
    found = draw(MemoryCache(rows, [active]), 0, Sampling(window=8), TOKENIZER)
    for half in (found.explainer, found.scorer):
        peaks = [example.peak for example in half.activating]
        assert peaks == pytest.approx([active[e.row, 2] for e in half.activating])

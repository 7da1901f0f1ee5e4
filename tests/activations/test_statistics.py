"""The streamed statistics equal the exact ones, in any batches, however ill-conditioned."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowly.activations import CovarianceFitter, MeanFitter
from narrowly.errors import NarrowlyError

torch.set_num_threads(1)


@st.composite
def activations(draw):
    """Vectors whose spectrum falls geometrically (by 1e4, or 1.5 per step), with a mean far off."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    d = draw(st.integers(2, 24))
    n = draw(st.integers(4 * d, 400))
    step = draw(st.floats(1.5, max(1.5, 10 ** (4 / (d - 1)))))
    scales = step ** -torch.arange(d, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) * scales @ turn
    offset = draw(st.sampled_from([0.0, 1.0, 1e3]))
    x = (x + offset * torch.randn(d, generator=generator, dtype=torch.float64)).float()
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=6)))
    return x, x.tensor_split(cuts)


def exact_components(x, k, centred):
    x = x.double()
    return torch.linalg.svd(x - x.mean(0) if centred else x, full_matrices=False).Vh[:k].T


def angle(a, b):
    """The largest principal angle between two subspaces, by its sine (exact for small angles)."""
    return torch.linalg.matrix_norm(a - b @ (b.T @ a), 2).item()


@settings(max_examples=60, deadline=None)
@given(activations())
def test_mean_and_covariance_equal_the_exact_ones(data):
    x, batches = data
    fitter = CovarianceFitter(x.shape[1])
    for batch in batches:
        fitter.update(batch)
    exact = x.double()
    assert fitter.n == len(x)
    torch.testing.assert_close(fitter.mean, exact.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fitter.covariance, torch.cov(exact.T), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        fitter.second_moment, exact.T @ exact / len(x), rtol=1e-9, atol=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(activations(), st.booleans())
def test_principal_components_span_the_exact_subspace(data, centred):
    x, batches = data
    k = min(3, x.shape[1] - 1)
    fitter = CovarianceFitter(x.shape[1])
    for batch in batches:
        fitter.update(batch)
    found = fitter.principal_components(k, centred=centred)
    torch.testing.assert_close(found.components.T @ found.components, torch.eye(k).double())
    assert angle(found.components, exact_components(x, k, centred)) <= 1e-4
    singular = torch.linalg.svdvals(x.double() - x.double().mean(0) if centred else x.double())
    variance = singular.square() / (len(x) - centred)
    torch.testing.assert_close(found.explained_variance, variance[:k], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found.explained_ratio, variance[:k] / variance.sum())
    moment = fitter.covariance if centred else fitter.second_moment
    along = (found.components.T @ moment @ found.components).diagonal()
    torch.testing.assert_close(along, found.explained_variance, rtol=1e-6, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(activations(), st.randoms(use_true_random=False))
def test_the_order_of_batches_does_not_matter(data, random):
    x, batches = data
    shuffled = list(batches)
    random.shuffle(shuffled)
    one, other = CovarianceFitter(x.shape[1]), CovarianceFitter(x.shape[1])
    for batch, again in zip(batches, shuffled, strict=True):
        one.update(batch)
        other.update(again)
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(one.covariance, other.covariance, rtol=1e-8, atol=1e-11)


def test_a_long_stream_far_from_zero_keeps_its_digits():
    fitter = CovarianceFitter(2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 2, generator=generator, dtype=torch.float64) * 1e-3 + 1e5
    for batch in x.split(1000):
        fitter.update(batch)
    torch.testing.assert_close(fitter.covariance, torch.cov(x.T), rtol=1e-6, atol=1e-14)


def test_the_state_does_not_grow_with_tokens():
    fitter = CovarianceFitter(4).update(torch.randn(10, 4))
    before = {name: value.shape for name, value in vars(fitter).items() if torch.is_tensor(value)}
    fitter.update(torch.randn(10_000, 4))
    after = {name: value.shape for name, value in vars(fitter).items() if torch.is_tensor(value)}
    assert before == after


def test_no_activations_is_an_error():
    with pytest.raises(NarrowlyError, match="no activations were read"):
        _ = MeanFitter(3).update(torch.zeros(0, 3)).mean


def test_more_components_than_tokens_is_an_error():
    fitter = CovarianceFitter(8).update(torch.randn(3, 8))
    with pytest.raises(NarrowlyError, match="5 principal components were asked for, but 3 tokens"):
        fitter.principal_components(5)


def test_activations_that_do_not_vary_are_an_error():
    fitter = CovarianceFitter(3).update(torch.ones(5, 3))
    with pytest.raises(NarrowlyError, match="do not vary"):
        fitter.principal_components(1)


def test_overflowed_activations_are_an_error():
    fitter = CovarianceFitter(2).update(torch.tensor([[1.0, float("inf")], [0.0, 1.0]]))
    with pytest.raises(NarrowlyError, match="not finite"):
        _ = fitter.covariance


def test_another_width_is_refused():
    with pytest.raises(ValueError, match=r"expected shape \[n, 3\]"):
        MeanFitter(3).update(torch.zeros(2, 4))

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import ARCHITECTURES, tiny_model
from torch import nn

from narrowly.errors import NarrowlyError
from narrowly.interventions import (
    Add,
    Clamp,
    Function,
    LowRankAffine,
    Noise,
    ProjectOut,
    Scale,
    Set,
    attach,
    layer,
    site,
)

D = 32
HERE = layer(0)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Q = torch.linalg.qr(draw(D, 3))[0]
UNIT = nn.functional.normalize(draw(D), dim=0)
DOWN, UP = draw(D, 2), draw(2, D)

# Every edit beside the line a person would write in a hook of their own.
ORACLES = {
    "project_out": (ProjectOut(Q, HERE), lambda h: h - (h @ Q) @ Q.T),
    "project_out centred": (
        ProjectOut(Q, HERE, centre=UNIT),
        lambda h: h - ((h - UNIT) @ Q) @ Q.T,
    ),
    "add": (Add(UNIT, HERE, strength=3.0), lambda h: h + 3 * UNIT),
    "set": (Set(UNIT, HERE), lambda h: UNIT.expand_as(h)),
    "scale": (Scale(0.25, HERE), lambda h: 0.25 * h),
    "clamp": (
        Clamp(7 * UNIT, HERE, low=-0.1, high=0.1),
        lambda h: h + ((h @ UNIT).clamp(-0.1, 0.1) - h @ UNIT)[..., None] * UNIT,
    ),
    "low_rank_affine": (
        LowRankAffine(DOWN, UP, HERE, bias=UNIT),
        lambda h: h + h @ DOWN @ UP + UNIT,
    ),
    "function": (Function(torch.tanh, HERE), torch.tanh),
}


@pytest.mark.parametrize("edit", ORACLES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_edit_equals_a_raw_hook(architecture, edit):
    model = tiny_model(architecture, hidden_size=D)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    intervention, oracle = ORACLES[edit]
    before = model(input_ids=ids).logits

    def hook(module, args, output):
        return (oracle(output[0]), *output[1:]) if isinstance(output, tuple) else oracle(output)

    from narrowly.interventions import decoder_layers

    handle = decoder_layers(model)[0].register_forward_hook(hook)
    expected = model(input_ids=ids).logits
    handle.remove()
    with attach(model, [intervention]):
        edited = model(input_ids=ids).logits
    torch.testing.assert_close(edited, expected, rtol=1e-5, atol=2e-6)
    assert not torch.allclose(edited, before), "the edit must have done something"
    assert torch.equal(model(input_ids=ids).logits, before), "and be gone afterwards"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.booleans())
def test_a_projection_is_idempotent_and_leaves_the_centre(seed, rank, centred):
    basis, h = draw(D, rank, seed=seed), draw(5, D, seed=seed + 1)
    centre = draw(D, seed=seed + 2) if centred else torch.zeros(D)
    edit = ProjectOut(basis, HERE, centre=centre if centred else None)
    once = edit(h)
    torch.testing.assert_close(edit(once), once, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        once @ edit.basis, (centre @ edit.basis).expand(5, rank), rtol=0, atol=1e-5
    )
    complement = torch.linalg.qr(torch.cat([edit.basis, draw(D, D)], dim=1))[0][:, rank:]
    torch.testing.assert_close(once @ complement, h @ complement, rtol=0, atol=1e-5)


def test_noise_has_its_norm_repeats_by_seed_and_looks_normal():
    h = torch.zeros(4, 100, 64)
    noise = Noise(2.5, HERE, seed=1)(h)
    torch.testing.assert_close(noise.norm(dim=-1), torch.full((4, 100), 2.5))
    assert torch.equal(noise, Noise(2.5, HERE, seed=1)(h))
    other = Noise(2.5, HERE, seed=2)(h)
    cosine = nn.functional.cosine_similarity(noise, other, dim=-1)
    assert cosine.abs().mean() < 0.15
    assert nn.functional.cosine_similarity(noise[0], noise[1], dim=-1).abs().mean() < 0.15
    scaled = noise * 64**0.5 / 2.5
    assert abs(scaled.mean()) < 0.03
    assert abs(scaled.std() - 1) < 0.03
    assert abs((scaled**4).mean() - 3) < 0.3


def test_orthonormal_columns_stay_bitwise_and_others_are_made_so():
    assert torch.equal(ProjectOut(Q, HERE).basis, Q)
    skewed = ProjectOut(Q @ draw(3, 3), HERE).basis
    torch.testing.assert_close(skewed.T @ skewed, torch.eye(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(skewed @ skewed.T, Q @ Q.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ProjectOut(torch.zeros(D), HERE), "direction 0 is zero"),
        (lambda: ProjectOut(torch.stack([UNIT, 2 * UNIT], 1), HERE), "linearly dependent"),
        (lambda: ProjectOut(UNIT * torch.nan, HERE), "basis is not finite"),
        (lambda: Add(torch.zeros(D), HERE), "the vector is zero"),
        (lambda: Add(UNIT / 0, HERE), "not finite"),
        (lambda: Clamp(torch.zeros(D), HERE, low=0), "non-zero vector"),
        (lambda: Clamp(UNIT, HERE), "give low, high or both"),
        (lambda: LowRankAffine(DOWN, UP.T, HERE), "must be [d, r] and [r, d]"),
        (lambda: Scale(2, HERE, phases=("training",)), "phases must be among"),
        (lambda: Scale(2, HERE, gradient="none"), "gradient must be"),
        (lambda: Scale(2, site("*.mlp", "side")), "must be 'input' or 'output'"),
    ],
)
def test_an_impossible_edit_is_refused_when_it_is_made(make, says):
    with pytest.raises(NarrowlyError) as error:
        make()
    assert says in str(error.value)

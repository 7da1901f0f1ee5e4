"""Latents are active where their model says, and their directions are what they write."""

import pytest
import torch

from narrowly.activations import stream
from narrowly.concepts import Concept, Provenance, Subspace
from narrowly.concepts.latents import PlacedSAE
from narrowly.errors import NarrowlyError
from narrowly.explain.latents import DirectionSource, SAESource, random_sae
from narrowly.explain.neurons import NeuronSource
from narrowly.interventions import capture, layer
from narrowly.saes import TopK
from tests.explain.planted import token_rows
from tests.saes.saes_for_tests import RULES
from tests.saes.saes_for_tests import random_sae as sae_for_tests
from tests.tiny import ARCHITECTURES, tiny_model

torch.set_num_threads(1)


def batch_of(model, sites, n=12):
    [batch] = stream(model, token_rows([n]), sites, positions="all")
    return batch


def concept(name, rank, sites, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Concept(
        name=name,
        subspaces={
            site: Subspace.spanned_by(torch.randn(width, rank, generator=generator))
            for site in sites
        },
        provenance=Provenance(model="tiny", model_fingerprint="f", finder="test"),
    )


def test_both_ends_of_every_direction():
    evil, mild = (
        concept("evil", 2, ["layer:0", "layer:1"]),
        concept("mild", 1, ["layer:1"], seed=1),
    )
    source = DirectionSource([evil, mild])
    assert source.names() == [
        *("evil@layer:0/0+", "evil@layer:0/0-", "evil@layer:0/1+", "evil@layer:0/1-"),
        *("evil@layer:1/0+", "evil@layer:1/0-", "evil@layer:1/1+", "evil@layer:1/1-"),
        *("mild@layer:1/0+", "mild@layer:1/0-"),
    ]
    batch = batch_of(tiny_model(), source.sites)
    projections = source.project(batch)
    for i, latent in enumerate(source.latents):
        column = projections[:, i // 2] * latent.sign
        torch.testing.assert_close(column, batch[latent.site] @ latent.direction)
        assert latent.sign == (-1 if i % 2 else 1)
        own = {"evil": evil, "mild": mild}[latent.concept].subspaces[str(latent.site)]
        torch.testing.assert_close(own.basis[:, latent.column] * latent.sign, latent.direction)
    cosines = source.cosines(4)
    torch.testing.assert_close(cosines[:6], torch.tensor([0.0, 0, 0, 0, 1, -1]))
    assert cosines[9] == pytest.approx(-float(cosines[8])) and abs(cosines[8]) > 1e-3
    only = DirectionSource([evil, mild], [layer(1)])
    assert only.sites == [layer(1)] and only.names() == source.names()[4:]
    assert only.fingerprint() != source.fingerprint()
    with pytest.raises(NarrowlyError, match="none of the concepts"):
        DirectionSource([evil], [layer(7)])
    with pytest.raises(NarrowlyError, match="several widths"):
        DirectionSource([evil, concept("wide", 1, ["layer:1"], 16)])
    with pytest.raises(NarrowlyError, match="16 wide, the model 32"):
        DirectionSource([concept("wide", 1, ["layer:1"], 16)]).project(batch)


@pytest.mark.parametrize("rule", RULES)
def test_latents_of_an_autoencoder(rule):
    sae = sae_for_tests(rule, d=32)
    placed = PlacedSAE(sae, layer(1), layer(1), "hash")
    batch = batch_of(tiny_model(), [layer(1)])
    dense = sae.encode(batch[layer(1)])
    whole, some = SAESource(placed), SAESource(placed, [7, 3, 39])
    assert len(whole.latents) == 40
    torch.testing.assert_close(whole.encode(batch).to_dense(), dense)
    found = some.encode(batch)
    assert (found.values > 0).all() and found.shape == (12, 3)
    torch.testing.assert_close(found.to_dense(), dense[:, [7, 3, 39]])
    assert some.names() == ["latent7-layer1", "latent3-layer1", "latent39-layer1"]
    for latent, number in zip(some.latents, [7, 3, 39], strict=True):
        assert latent.name == latent.concept == f"latent{number}-layer1"
        torch.testing.assert_close(latent.direction, sae.W_dec[number] / sae.W_dec[number].norm())
    expected = torch.stack([q.direction @ some.latents[1].direction for q in some.latents])
    torch.testing.assert_close(some.cosines(1), expected)
    torch.testing.assert_close(whole.cosines(3)[[7, 3, 39]], expected)
    named = SAESource(placed, [7, 3], ["boats", "cats"])
    assert [latent.concept for latent in named.latents] == ["boats", "cats"] == named.names()
    assert len({source.fingerprint() for source in (whole, some, named)}) == 3


def test_latents_there_are_not():
    placed = PlacedSAE(sae_for_tests(d=32), layer(1), layer(1), "hash")
    with pytest.raises(NarrowlyError, match="has no latent 40, only 0 to 39"):
        SAESource(placed, [3, 40])
    with pytest.raises(NarrowlyError, match="1 names for 2 latents"):
        SAESource(placed, [3, 4], ["cats"])
    with pytest.raises(IndexError):
        SAESource(placed).latents[40]


@pytest.mark.parametrize("rule", RULES)
def test_a_random_autoencoder_of_equal_shape_and_rule(rule):
    sae = sae_for_tests(rule, d=32)
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    one, again, other = random_sae(sae, 1), random_sae(sae, 1), random_sae(sae, 2)
    for key, value in sae.state_dict().items():
        assert torch.equal(value, before[key])
        assert one.state_dict()[key].shape == value.shape
        assert torch.equal(one.state_dict()[key], again.state_dict()[key])
    assert type(one.rule) is type(sae.rule) and vars(one.rule).keys() == vars(sae.rule).keys()
    torch.testing.assert_close(one.W_dec.norm(dim=1), torch.ones(40))
    torch.testing.assert_close(one.W_enc.norm(dim=0), sae.W_enc.norm(dim=0))
    torch.testing.assert_close(one.W_enc.T / one.W_enc.norm(dim=0)[:, None], one.W_dec)
    for control in (one, other):
        assert abs((control.W_dec * sae.W_dec).sum(dim=1)).mean() < 2  # unrelated
    assert not torch.equal(one.W_dec, other.W_dec)
    if isinstance(sae.rule, TopK):
        assert one.rule.k == sae.rule.k


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "gated"])
def test_a_random_autoencoder_fires_as_often(rule):
    sae = sae_for_tests(rule, d=32)
    x = torch.randn(300, 32)
    rates, control = ((a.encode(x) > 0).float().mean(dim=0) for a in (sae, random_sae(sae, 1, x)))
    if sae.threshold_rule:
        torch.testing.assert_close(control, rates, atol=0.005, rtol=0)
    else:
        torch.testing.assert_close(control.sum(), rates.sum(), atol=0.1, rtol=0)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "qwen2_moe"])
def test_neurons(architecture):
    model = tiny_model(architecture)
    source = NeuronSource(model, 1, top=5)
    [site] = source.sites
    batch = batch_of(model, source.sites)
    x = batch[site]
    signed = torch.zeros_like(x)
    columns = x.abs().topk(5).indices
    signed.scatter_(1, columns, x.gather(1, columns))
    both = torch.stack([signed.clamp(min=0), (-signed).clamp(min=0)], dim=2).flatten(1)
    found = source.encode(batch)
    torch.testing.assert_close(found.to_dense(), both)
    assert len(source.latents) == 2 * x.shape[1] == 2 * 4 * 32 or x.shape[1] == 64
    some = NeuronSource(model, 1, top=5, neurons=[9, 2])
    torch.testing.assert_close(some.encode(batch).to_dense(), both[:, [18, 19, 4, 5]])
    assert some.names()[:2] == ["neuron9-layer1+", "neuron9-layer1-"]
    assert [latent.name for latent in some.latents] == some.names()
    torch.testing.assert_close(some.cosines(0), source.cosines(18)[[18, 19, 4, 5]])
    for latent, i in zip(some.latents, [9, 9, 2, 2], strict=True):
        # What the neuron writes is what more of it changes at the module's output.
        module = model.get_submodule(str(latent.site))
        more = torch.nn.functional.one_hot(torch.tensor([i]), x.shape[1]).float() * latent.sign
        with torch.no_grad():
            wrote = module(more) - module(0 * more)
        torch.testing.assert_close(wrote[0] / wrote.norm(), latent.direction, rtol=1e-3, atol=1e-4)
        tokens = torch.tensor([[30, 40]])
        assert capture(model, tokens, [latent.site])[latent.site].shape == (1, 2, 32)
    with pytest.raises(NarrowlyError, match="layer 1 has no neuron 999"):
        NeuronSource(model, 1, neurons=[999])


def test_where_neurons_cannot_be_told():
    with pytest.raises(NarrowlyError, match="mixture of experts"):
        NeuronSource(tiny_model("qwen2_moe"), 1)

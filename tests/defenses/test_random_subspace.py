import pytest
import torch

from narrowly.concepts import load_concepts
from narrowly.defenses import make_defenses
from narrowly.files import read_json
from narrowly.training import train
from tests.defenses.concepts import make_concept
from tests.tiny import tiny_model


@pytest.fixture
def model():
    return tiny_model().train()


def projections(model, seed=3, **arguments):
    [defense] = make_defenses([{"random_subspace": arguments}])
    defense.bind(model, None, seed)
    return defense.interventions(model)


def bases(model, **arguments) -> list[torch.Tensor]:
    return [each.basis for each in projections(model, **arguments)]


def test_rank_sites_centre_and_strength_are_the_ablations(model):
    concept = make_concept(model, rank=3, centre=torch.randn(32))
    [only] = projections(
        model, concepts=[concept], centred=True, layers=[1], strength=0.5, gradient="backward"
    )
    assert str(only.site) == "layer:1" and only.basis.shape == (32, 3)
    assert torch.equal(only.centre, concept.subspaces["layer:1"].centre)
    assert float(only.strength) == 0.5 and only.gradient == "backward"


def test_it_is_far_from_the_concept(model):
    concept = make_concept(model, seed=1)
    for basis, subspace in zip(
        bases(model, concepts=[concept]), concept.subspaces.values(), strict=True
    ):
        assert (basis.T @ subspace.basis).abs().max() < 0.6


def test_the_runs_seed_decides_unless_another_is_given(model):
    concepts = [make_concept(model)]

    def same(one, other):
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    assert same(bases(model, concepts=concepts), bases(model, concepts=concepts))
    assert not same(bases(model, concepts=concepts), bases(model, concepts=concepts, seed=4))
    assert same(
        bases(model, concepts=concepts, seed=4),
        [p.basis for p in projections(model, 4, concepts=concepts)],
    )
    both, one = bases(model, concepts=concepts), bases(model, concepts=concepts, layers=[1])
    assert torch.equal(both[1], one[0])  # fewer layers draw the same there


def test_the_record_says_that_it_is_random(recipe, concepts):
    run = train(recipe(defenses=[{"random_subspace": {"concepts": str(concepts)}}]), progress=False)
    [entry] = read_json(run.path / "defenses.json")
    assert entry["defense"] == "random_subspace"
    assert entry["seed"] == 0
    assert [*entry["concepts"]] == ["random0-persona"]
    [kept] = load_concepts(run.path / "concepts")
    assert kept.provenance.finder == "random"

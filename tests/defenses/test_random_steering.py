import pytest
import torch

from narrowly.concepts import save_concepts
from narrowly.defenses import make_defenses
from narrowly.defenses.random_steering import rotated
from narrowly.files import read_json
from narrowly.models import load_model
from narrowly.training import train
from tests.defenses.concepts import make_concept
from tests.tiny import tiny_model

LENGTHS = {0: 0.5, 1: 2.0}


@pytest.fixture
def model():
    return tiny_model().train()


def added(model, name, seed=0, **arguments) -> torch.Tensor:
    """What is added at each site, [sites, d]."""
    concept = make_concept(model, lengths=LENGTHS)
    [defense] = make_defenses([{name: {"concepts": [concept], **arguments}}])
    defense.bind(model, None, seed)
    return torch.stack([each.vector for each in defense.interventions(model)])


def test_lengths_and_angles_are_those_of_the_steering(model):
    true, random = added(model, "preventive_steering"), added(model, "random_steering")
    torch.testing.assert_close(random @ random.T, true @ true.T)
    assert (random[0] @ true[0]).abs() < 0.6 * true[0].square().sum()


def test_the_runs_seed_decides_unless_another_is_given(model):
    assert torch.equal(added(model, "random_steering"), added(model, "random_steering"))
    other = added(model, "random_steering", seed=1)
    assert not torch.equal(added(model, "random_steering"), other)
    assert torch.equal(
        added(model, "random_steering", **{"seed": 0}), added(model, "random_steering")
    )


def test_directions_are_uniform():
    """Each coordinate is as often negative as positive, of mean square 1 / d."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([rotated([torch.eye(4)[0]], generator)[0] for _ in range(2000)])
    assert draws.mean(0).abs().max() < 0.05
    torch.testing.assert_close(draws.square().mean(0), torch.full((4,), 0.25), atol=0.02, rtol=0)


def test_more_vectors_than_their_span_has_dimensions():
    vectors = [torch.randn(3) for _ in range(5)]
    turned = rotated(vectors, torch.Generator().manual_seed(0))
    one, other = torch.stack(vectors), torch.stack(turned)
    torch.testing.assert_close(other @ other.T, one @ one.T)


class TestTraining:
    @pytest.fixture
    def folder(self, model_folder, tmp_path):
        model, _ = load_model(model_folder)
        return str(save_concepts([make_concept(model, lengths=LENGTHS)], tmp_path / "lengths"))

    def test_the_record_tells_the_seed(self, recipe, folder):
        run = train(recipe(defenses=[{"random_steering": {"concepts": folder}}]), progress=False)
        [entry] = read_json(run.path / "defenses.json")
        assert (entry["defense"], entry["seed"]) == ("random_steering", 0)

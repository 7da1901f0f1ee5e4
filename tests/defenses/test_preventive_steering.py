import pytest
import torch

from narrowly.concepts import save_concepts
from narrowly.defenses import make_defenses
from narrowly.errors import NarrowlyError
from narrowly.files import read_json
from narrowly.interventions import attach, capture, layer
from narrowly.models import load_model
from narrowly.training import train
from tests.defenses.concepts import make_concept
from tests.tiny import ARCHITECTURES, tiny_model

IDS = torch.arange(12).reshape(2, 6) + 20
LENGTHS = {0: 0.5, 1: 2.0}


@pytest.fixture
def model():
    return tiny_model().train()


def steering(model, **arguments):
    [defense] = make_defenses([{"preventive_steering": arguments}])
    defense.bind(model, None, 0)
    return defense.interventions(model)


def hidden(model, at: int) -> torch.Tensor:
    return capture(model, {"input_ids": IDS}, [layer(at)])[layer(at)]


def vector(concept, at: int) -> torch.Tensor:
    site = f"layer:{at}"
    return concept.scores["difference_norm"][site] * concept.subspaces[site].basis[:, 0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("strength", [5.0, -1.5])
def test_the_stream_is_off_by_so_many_vectors_in_training_alone(architecture, strength):
    model = tiny_model(architecture)
    concept = make_concept(model, lengths=LENGTHS)
    plain = model(IDS).logits
    before = hidden(model, 1)
    with attach(
        model, steering(model, concepts=[concept], layers=[1], strength=strength)
    ) as attachment:
        assert torch.equal(model(IDS).logits, plain)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        torch.testing.assert_close(
            hidden(model, 1) - before,
            strength * vector(concept, 1).expand(2, 6, 32),
            rtol=1e-3,
            atol=1e-4,
        )
        model(IDS)
        assert attachment.report()[0]["phases"] == ["train"]


def test_the_published_strength(model):
    [only] = steering(model, concepts=[make_concept(model, lengths=LENGTHS)], layers=[0])
    assert float(only.strength) == 5.0


def test_at_several_layers_what_is_added_sums_up_to_each_layers_vector(model):
    concept = make_concept(model, lengths=LENGTHS)
    first, second = steering(model, concepts=[concept])
    torch.testing.assert_close(first.vector, vector(concept, 0))
    torch.testing.assert_close(first.vector + second.vector, vector(concept, 1))


def test_a_vector_that_does_not_grow_is_added_once(model):
    concept = make_concept(model, lengths={0: 2.0, 1: 2.0})
    same = {site: concept.subspaces["layer:0"] for site in concept.subspaces}
    [only] = steering(model, concepts=[concept.model_copy(update={"subspaces": same})])
    assert only.site == layer(0)


def test_each_layer_and_schedule_its_own_strength(model):
    [defense] = make_defenses(
        [
            {
                "preventive_steering": {
                    "concepts": [make_concept(model, lengths=LENGTHS)],
                    "strength": {0: [[0, 5], [1, 0]], 1: 1},
                }
            }
        ]
    )
    assert [float(each.strength) for each in defense.interventions(model)] == [5.0, 1.0]
    assert defense.strength_at(0.5) == {layer(0): 2.5, layer(1): 1}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, r"does not tell how long its vector is at layer:0 .*Find it with mean_difference"),
        ({"lengths": {1: 1.0}}, r"how long its vector is at layer:0"),
        ({"lengths": LENGTHS, "rank": 2}, "persona has 2 directions at layer:0, and only one"),
        ({"lengths": LENGTHS, "verdict": "keep"}, r"no concept has the verdict undesired"),
    ],
)
def test_a_concept_without_a_vector_is_refused(model, fields, message):
    with pytest.raises(NarrowlyError, match=message):
        steering(model, concepts=[make_concept(model, **fields)])


def test_an_unknown_layer_is_named(model):
    with pytest.raises(NarrowlyError, match=r"no subspace at layer 9.*layer:0, layer:1"):
        steering(model, concepts=[make_concept(model, lengths=LENGTHS)], layers=[9])


class TestTraining:
    @pytest.fixture
    def folder(self, model_folder, tmp_path):
        model, _ = load_model(model_folder)
        return str(save_concepts([make_concept(model, lengths=LENGTHS)], tmp_path / "lengths"))

    def test_beside_the_ablation_of_the_same_concept_it_is_refused(self, recipe, folder, tmp_path):
        defenses = [{"preventive_steering": {"concepts": folder}}, {"ablate": {"concepts": folder}}]
        with pytest.raises(NarrowlyError, match=r"removes at layer:0 what another defense"):
            train(recipe(defenses=defenses), progress=False)
        assert not (tmp_path / "run").exists()

    def test_beside_other_defenses_it_acts(self, recipe, folder):
        defenses = [
            {"preventive_steering": {"concepts": folder, "layers": [1]}},
            {"gradient_projection": {"concepts": folder}},
            {"random_subspace": {"concepts": folder, "seed": 7}},
        ]
        run = train(recipe(defenses=defenses), progress=False)
        record = read_json(run.path / "defenses.json")
        assert [[i["forwards"] for i in e["interventions"]] for e in record] == [
            [4],
            [4, 4],
            [4, 4],
        ]
        assert [i["strength"] for i in record[0]["interventions"]] == [5.0]

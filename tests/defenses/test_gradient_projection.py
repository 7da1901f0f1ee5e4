import pytest
import torch

from narrowly.defenses import make_defenses
from narrowly.errors import NarrowlyError
from narrowly.interventions import attach
from tests.defenses.concepts import make_concept
from tests.tiny import tiny_model

IDS = torch.arange(12).reshape(2, 6) + 20


@pytest.fixture
def model():
    return tiny_model().train()


def defend(model, **arguments):
    [defense] = make_defenses([{"gradient_projection": arguments}])
    defense.bind(model, None, 0)
    return attach(model, defense.interventions(model))


def gradients(model) -> list[torch.Tensor]:
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_gradients_are_those_of_a_hand_written_hook(model, strength):
    concept = make_concept(model, rank=2)
    plain = gradients(model)

    def project(at):
        q = concept.subspaces[f"layer:{at}"].basis

        def forward(module, args, h):
            h.register_hook(lambda g: g - strength * (g @ q) @ q.T)

        return forward

    handles = [model.model.layers[i].register_forward_hook(project(i)) for i in (0, 1)]
    expected = gradients(model)
    for handle in handles:
        handle.remove()
    with defend(model, concepts=[concept], strength=strength):
        found = gradients(model)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert not all(torch.equal(one, other) for one, other in zip(plain, expected, strict=True))


def test_the_activations_stay_bitwise(model):
    plain = model(IDS).logits
    with defend(model, concepts=[make_concept(model)]):
        assert torch.equal(model(IDS).logits, plain)


def test_centring_and_halves_are_no_arguments_of_it():
    for field in ("centred", "gradient"):
        with pytest.raises(NarrowlyError, match=f"unknown key '{field}'"):
            make_defenses([{"gradient_projection": {"concepts": "x", field: "forward"}}])

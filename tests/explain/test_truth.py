import numpy as np
import pytest
import torch

from narrowly.concepts import Subspace, Verdict
from narrowly.explain.truth import _separation, agreement, separations
from tests.explain.persona import persona_concept, persona_model


def planted(value: float, domain: float, seed: int = 0):
    """Projections of 600 answers that hold a value and one of 12 domains by so much."""
    rng = np.random.default_rng(seed)
    cruel, domains = rng.integers(2, size=600), rng.integers(12, size=600)
    of = rng.standard_normal(12)
    return value * cruel + domain * of[domains] + rng.standard_normal(600), cruel, domains


@pytest.mark.parametrize(
    ("value", "domain", "undesired"),
    [(4, 0, True), (-4, 0, True), (4, 0.5, True), (0, 4, False), (4, 8, False), (0, 0, False)],
)
def test_a_direction_is_undesired_if_it_separates_values_more_than_domains(
    value, domain, undesired
):
    found = _separation(*planted(value, domain))
    assert found.undesired == undesired
    assert found.value == pytest.approx(
        _separation(*planted(-value, -domain)).value, abs=0.1
    )  # either sign is ablated alike


def test_domains_do_not_blur_the_values():
    assert _separation(*planted(4, 40)).value > 0.95


@pytest.fixture(scope="module")
def measured():
    persona = persona_concept()
    generator = torch.Generator().manual_seed(0)
    chance = {
        site: Subspace.spanned_by(torch.randn(subspace.width, 2, generator=generator))
        for site, subspace in persona.subspaces.items()
    }
    late = {site: persona.subspaces[site] for site in ("layer:2", "layer:3")}
    concepts = [
        persona.model_copy(update={"name": "persona", "subspaces": late}),
        persona.model_copy(update={"name": "chance", "subspaces": chance}),
    ]
    return separations(concepts, persona_model(), limit=300)


def test_the_persona_is_undesired_and_chance_is_not(measured):
    assert measured["persona"].undesired and measured["persona"].value > 0.85
    assert not measured["chance"].undesired


def test_agreement_counts_undecided_against_the_judge_and_knows_its_baselines():
    said = ["undesired", "undesired", "keep", "keep", "undecided"]
    true = [True, False, False, True, False]
    names = [f"c{i}" for i in range(5)]
    proposals = {n: Verdict(value=v) for n, v in zip(names, said, strict=True)}
    found = agreement(proposals, dict(zip(names, true, strict=True)))
    assert (found.concepts, found.undesired) == (5, 2)
    assert found.agree == pytest.approx(2 / 5)
    assert found.undecided == pytest.approx(1 / 5)
    assert found.found == found.right == pytest.approx(1 / 2)
    assert found.always_keep == pytest.approx(3 / 5)
    rng, values = np.random.default_rng(0), np.array(said)
    dealt = [
        ((p := rng.permutation(values)) == np.where(true, "undesired", "keep")).mean()
        for _ in range(4000)
    ]
    assert found.shuffled == pytest.approx(np.mean(dealt), abs=0.01) and len(p) == 5


def test_where_nothing_is_undesired_there_is_no_recall():
    found = agreement({"a": Verdict(value="keep")}, {"a": False})
    assert found.agree == 1 and found.found is None and found.right is None

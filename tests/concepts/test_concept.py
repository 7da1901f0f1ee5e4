"""A concept is frozen, checked, and becomes the interventions that ablate it."""

import pytest
import torch
from pydantic import ValidationError

from narrowly.concepts import Concept, Provenance, Subspace
from narrowly.errors import NarrowlyError

torch.set_num_threads(1)


def provenance() -> Provenance:
    return Provenance(model="tiny", model_fingerprint="f" * 64, finder="test")


@pytest.mark.parametrize("sign", [1, -1])
def test_a_subspace_spans_the_directions_given_and_keeps_their_signs(sign):
    directions = sign * torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    subspace = Subspace.spanned_by(directions)
    assert (subspace.width, subspace.rank) == (8, 3)
    torch.testing.assert_close(subspace.basis.T @ subspace.basis, torch.eye(3))
    left = directions - subspace.basis @ (subspace.basis.T @ directions)
    assert left.abs().max() < 1e-6
    first = directions[:, 0] / directions[:, 0].norm()
    torch.testing.assert_close(subspace.basis[:, 0], first)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), "length zero"),
        (torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]]), "linearly dependent"),
        (torch.ones(2, 3), "linearly dependent"),
        (torch.tensor([[float("nan")], [1.0]]), "length zero, or one that is not finite"),
    ],
)
def test_directions_that_span_nothing_are_refused(directions, message):
    with pytest.raises(NarrowlyError, match=message):
        Subspace.spanned_by(directions)


def test_a_basis_that_is_not_orthonormal_is_refused():
    with pytest.raises(NarrowlyError, match=r"not orthonormal.*spanned_by"):
        Subspace(torch.tensor([[1.0], [1.0]]), torch.zeros(2))
    with pytest.raises(NarrowlyError, match="needs a basis"):
        Subspace(torch.tensor([[1.0], [0.0]]), torch.zeros(3))


def test_a_concept_is_frozen_and_its_name_can_be_a_file():
    subspaces = {"layer:1": Subspace.spanned_by(torch.ones(4, 1))}
    concept = Concept(name="evil-1", subspaces=subspaces, provenance=provenance())
    assert concept.verdict.value == "undecided"
    with pytest.raises(ValidationError):
        concept.name = "other"
    for name in ("../evil", "a.b", ""):
        with pytest.raises(ValidationError):
            Concept(name=name, subspaces=subspaces, provenance=provenance())
    with pytest.raises(ValidationError):
        Concept(name="nothing", subspaces={}, provenance=provenance())


def test_interventions_project_the_subspace_out_at_every_site():
    concept = Concept(
        name="evil",
        subspaces={
            "layer:0": Subspace.spanned_by(torch.eye(4)[:, :1]),
            "layer:2": Subspace.spanned_by(torch.eye(4)[:, 1:3], torch.full((4,), 2.0)),
        },
        provenance=provenance(),
    )
    zero = concept.interventions()
    assert [str(edit.site) for edit in zero] == ["layer:0", "layer:2"]
    assert all(edit.phases == ("train",) and float(edit.strength) == 1 for edit in zero)
    h = torch.arange(4.0)[None]
    assert zero[0](h).tolist() == [[0.0, 1.0, 2.0, 3.0]]
    assert zero[1](h).tolist() == [[0.0, 0.0, 0.0, 3.0]]
    centred = concept.interventions(strength=0.5, centred=True, phases=("eval",))
    assert centred[1](h).tolist() == [[0.0, 2.0, 2.0, 3.0]]
    assert centred[1].phases == ("eval",)
    assert float(centred[0].strength) == 0.5

"""The control matches what it controls in everything but meaning."""

import pytest
import torch

from narrowly.concepts import Concept, Provenance, Subspace, find, load_concepts, save_concepts
from narrowly.errors import NarrowlyError


@pytest.fixture
def concepts() -> list[Concept]:
    provenance = Provenance(model="tiny", model_fingerprint="f", finder="test", data={"data": "0"})
    generator = torch.Generator().manual_seed(0)

    def subspace(rank: int) -> Subspace:
        return Subspace.spanned_by(
            torch.randn(64, rank, generator=generator), torch.randn(64, generator=generator)
        )

    return [
        Concept(
            name="evil",
            subspaces={"layer:0": subspace(1), "layer:3": subspace(3)},
            provenance=provenance,
        ),
        Concept(name="pc0", subspaces={"layer:1": subspace(2)}, provenance=provenance),
    ]


def test_a_control_keeps_sites_ranks_and_centres(concepts):
    controls = find("random", concepts=concepts, seed=4)
    assert [control.name for control in controls] == ["random4-evil", "random4-pc0"]
    for concept, control in zip(concepts, controls, strict=True):
        assert control.subspaces.keys() == concept.subspaces.keys()
        assert control.provenance.model_fingerprint == concept.provenance.model_fingerprint
        assert control.provenance.finder == "random"
        assert control.provenance.arguments["seed"] == 4
        for site, subspace in concept.subspaces.items():
            random = control.subspaces[site]
            assert random.basis.shape == subspace.basis.shape
            assert torch.equal(random.centre, subspace.centre)
            assert (random.basis.T @ subspace.basis).abs().max() < 0.6


def test_controls_are_seeded(concepts):
    def bases(seed):
        found = find("random", concepts=concepts, seed=seed)
        return torch.cat([s.basis for c in found for s in c.subspaces.values()], dim=1)

    assert torch.equal(bases(0), bases(0))
    assert not torch.equal(bases(0), bases(1))


def test_concepts_may_be_named_by_their_folder(tmp_path, concepts):
    save_concepts(concepts, tmp_path)
    controls = find("random", concepts=tmp_path)
    assert len(controls) == 2
    save_concepts(controls, tmp_path / "random")
    assert len(load_concepts(tmp_path / "random")) == 2


def test_nothing_to_match_is_an_error(tmp_path):
    with pytest.raises(NarrowlyError, match="no concepts to match"):
        find("random", concepts=[])
    with pytest.raises(NarrowlyError, match="no concepts here"):
        find("random", concepts=tmp_path)

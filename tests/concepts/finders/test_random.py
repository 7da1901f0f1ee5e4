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


def test_directions_may_be_drawn_among_other_concepts(concepts):
    generator = torch.Generator().manual_seed(1)
    pool = [
        Concept(
            name=f"pc{i}-{site.replace(':', '')}",
            subspaces={site: Subspace.spanned_by(torch.randn(64, 1, generator=generator))},
            provenance=concepts[0].provenance,
        )
        for site in ("layer:0", "layer:1", "layer:3")
        for i in range(4)
    ]
    pool.append(pool[0].model_copy(update={"name": "twice"}))
    controls = find("random", concepts=concepts, among=pool, seed=2)
    assert [control.name for control in controls] == ["random2-among-evil", "random2-among-pc0"]
    for concept, control in zip(concepts, controls, strict=True):
        for site, subspace in concept.subspaces.items():
            random = control.subspaces[site]
            assert random.rank == subspace.rank
            assert torch.equal(random.centre, subspace.centre)
            known = torch.cat([c.subspaces[site].basis for c in pool if site in c.subspaces], dim=1)
            # Not lstsq: "twice" makes the columns dependent, which its default driver may miss.
            columns, lengths, _ = torch.linalg.svd(known.double(), full_matrices=False)
            columns = columns[:, lengths > 1e-5 * lengths[0]]
            inside = columns @ (columns.T @ random.basis.double())
            torch.testing.assert_close(inside.float(), random.basis, atol=1e-4, rtol=0)
    again, other = (find("random", concepts=concepts, among=pool, seed=seed) for seed in (2, 3))
    first = controls[0].subspaces["layer:3"].basis
    assert torch.equal(first, again[0].subspaces["layer:3"].basis)
    assert not torch.equal(first, other[0].subspaces["layer:3"].basis)


def test_too_few_directions_to_draw_from_are_an_error(concepts):
    with pytest.raises(NarrowlyError, match=r"layer:3: .* hold 1 independent directions there"):
        find("random", concepts=concepts, among=[_one_direction(64)] * 4)
    with pytest.raises(NarrowlyError, match=r"layer:0: .* are 32 wide, those to match 64"):
        find("random", concepts=concepts, among=[_one_direction(32)])
    with pytest.raises(NarrowlyError, match=r"layer:1: .* hold 0 independent directions there"):
        find("random", concepts=concepts[1:], among=[_one_direction(64)])


def _one_direction(width: int) -> Concept:
    subspace = Subspace.spanned_by(torch.ones(width, 1))
    return Concept(
        name="one",
        subspaces={"layer:0": subspace, "layer:3": subspace},
        provenance=Provenance(model="tiny", model_fingerprint="f", finder="test"),
    )

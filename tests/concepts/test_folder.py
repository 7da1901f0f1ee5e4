"""Concepts come back from disk bitwise equal, on the right model, or with a clear error."""

import json
import subprocess
import sys

import pytest
import torch

from narrowly.concepts import (
    Concept,
    Provenance,
    Subspace,
    load_concepts,
    mark,
    save_concepts,
)
from narrowly.concepts.folder import add_scores, export, forget
from narrowly.errors import NarrowlyError
from narrowly.files import load_safetensors
from narrowly.interventions import attach
from narrowly.models import fingerprint
from tests.tiny import tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def concept(model) -> Concept:
    generator = torch.Generator().manual_seed(0)
    return Concept(
        name="evil",
        subspaces={
            f"layer:{i}": Subspace.spanned_by(
                torch.randn(32, i + 1, generator=generator), torch.randn(32, generator=generator)
            )
            for i in range(2)
        },
        provenance=Provenance(
            model="tiny",
            model_fingerprint=fingerprint(model),
            finder="test",
            arguments={"layers": [0, 1]},
            data={"data": "0" * 64},
        ),
        explanation="harm for its own sake",
        scores={"relative_norm": {"layer:0": 0.1, "layer:1": 0.2}, "tokens": 7},
    )


def test_what_is_saved_is_what_is_loaded(tmp_path, model, concept):
    save_concepts([concept], tmp_path)
    for path in (tmp_path, tmp_path / "evil.json"):
        [loaded] = load_concepts(path, model)
        assert loaded.model_dump(exclude={"subspaces"}) == concept.model_dump(exclude={"subspaces"})
        for site, subspace in concept.subspaces.items():
            assert torch.equal(loaded.subspaces[site].basis, subspace.basis)
            assert torch.equal(loaded.subspaces[site].centre, subspace.centre)


def test_sites_may_share_a_tensor(tmp_path, concept):
    shared = dict.fromkeys(concept.subspaces, next(iter(concept.subspaces.values())))
    save_concepts([concept.model_copy(update={"subspaces": shared})], tmp_path)
    [loaded] = load_concepts(tmp_path)
    assert loaded.subspaces.keys() == shared.keys()


@pytest.mark.parametrize("centred", [False, True])
def test_a_loaded_concept_ablates_to_bitwise_equal_logits(tmp_path, model, concept, centred):
    save_concepts([concept], tmp_path)
    batch = {"input_ids": torch.arange(20)[None] + 100}
    logits = []
    for source in ([concept], load_concepts(tmp_path, model)):
        edits = [e for c in source for e in c.interventions(centred=centred, phases=("eval",))]
        with attach(model, edits, example=batch), torch.no_grad():
            logits.append(model(**batch).logits)
    with torch.no_grad():
        bare = model(**batch).logits
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], bare)


def test_another_model_is_refused_unless_insisted_on(tmp_path, concept):
    save_concepts([concept], tmp_path)
    other = tiny_model(seed=1)
    with pytest.raises(NarrowlyError, match=r"evil\.json: found on tiny .*any_model=True"):
        load_concepts(tmp_path, other)
    assert len(load_concepts(tmp_path, other, any_model=True)) == 1


def test_another_width_or_depth_is_refused_even_if_insisted_on(tmp_path, concept):
    save_concepts([concept], tmp_path)
    wide = tiny_model(hidden_size=64, head_dim=16)
    with pytest.raises(NarrowlyError, match=r"layer:0: the subspace is 32 wide, the model 64"):
        load_concepts(tmp_path, wide, any_model=True)
    with pytest.raises(NarrowlyError, match="1 decoder layers"):
        load_concepts(tmp_path, tiny_model(num_hidden_layers=1), any_model=True)


def test_truncated_tensors_are_refused(tmp_path, concept):
    save_concepts([concept], tmp_path)
    path = tmp_path / "evil.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(NarrowlyError, match=r"evil\.safetensors: truncated"):
        load_concepts(tmp_path)


def test_edited_tensors_are_refused(tmp_path, concept):
    save_concepts([concept], tmp_path)
    path = tmp_path / "evil.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(NarrowlyError, match=r"evil\.safetensors: not the tensors .*sha256"):
        load_concepts(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": {"value": "undesird"}}, r"evil\.json: not a concept: verdict\.value"),
        ({"format": "other"}, r"evil\.json: not a concept: format"),
        ({"naem": 1}, r"evil\.json: not a concept: naem"),
    ],
)
def test_a_json_edited_wrongly_is_refused(tmp_path, concept, change, message):
    save_concepts([concept], tmp_path)
    path = tmp_path / "evil.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(NarrowlyError, match=message):
        load_concepts(tmp_path)


def test_a_folder_without_concepts_names_the_one_that_may_be_meant(tmp_path):
    with pytest.raises(NarrowlyError, match="no concepts here"):
        load_concepts(tmp_path)
    (tmp_path / "concepts").mkdir()
    with pytest.raises(NarrowlyError, match=r"Did you mean .*concepts"):
        load_concepts(tmp_path)


def test_a_verdict_changes_the_json_alone(tmp_path, model, concept):
    save_concepts([concept], tmp_path)
    before = json.loads((tmp_path / "evil.json").read_text())
    mark(tmp_path, "evil", "undesired", by="Ada", why="wishes harm")
    after = json.loads((tmp_path / "evil.json").read_text())
    assert after.pop("verdict") == {"value": "undesired", "by": "Ada", "why": "wishes harm"}
    before.pop("verdict")
    assert after == before
    [loaded] = load_concepts(tmp_path, model)
    assert loaded.verdict.by == "Ada"
    with pytest.raises(NarrowlyError, match=r"unknown concept 'evli'. Did you mean 'evil'"):
        mark(tmp_path, "evli", "keep")
    with pytest.raises(
        NarrowlyError, match=r"unknown verdict 'undesird'. Did you mean 'undesired'"
    ):
        mark(tmp_path, "evil", "undesird")


def test_a_verdict_is_not_overwritten_by_finding_again(tmp_path, concept):
    save_concepts([concept], tmp_path)
    save_concepts([concept], tmp_path)
    mark(tmp_path, "evil", "keep", by="Ada")
    with pytest.raises(NarrowlyError, match=r"evil\.json: carries a verdict \(keep, by Ada\)"):
        save_concepts([concept], tmp_path)


def test_two_concepts_of_one_name_are_refused(tmp_path, concept):
    with pytest.raises(NarrowlyError, match="two concepts are named 'evil'"):
        save_concepts([concept, concept], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_scores_are_added_beside_those_there_are(tmp_path, concept):
    save_concepts([concept], tmp_path)
    add_scores(tmp_path, "evil", {"norm_share": {"layer:0": 0.5}})
    [loaded] = load_concepts(tmp_path)
    assert loaded.scores == concept.scores | {"norm_share": {"layer:0": 0.5}}
    with pytest.raises(NarrowlyError, match="Did you mean 'evil'"):
        add_scores(tmp_path, "evli", {})


def test_concepts_are_forgotten_unless_they_carry_a_verdict(tmp_path, concept):
    save_concepts([concept, concept.model_copy(update={"name": "good"})], tmp_path)
    mark(tmp_path, "good", "keep")
    with pytest.raises(NarrowlyError, match="carries a verdict"):
        forget(tmp_path, ["evil", "good"])
    assert len(load_concepts(tmp_path)) == 2
    forget(tmp_path, ["evil", "absent"])
    assert [c.name for c in load_concepts(tmp_path)] == ["good"]


def test_an_exported_folder_is_one_of_concepts(tmp_path, model, concept):
    save_concepts([concept, concept.model_copy(update={"name": "good"})], tmp_path / "c")
    with pytest.raises(NarrowlyError, match="no concept here is undesired"):
        export(tmp_path / "c", tmp_path / "out")
    mark(tmp_path / "c", "evil", "undesired", by="me", why="harm")
    assert export(tmp_path / "c", tmp_path / "out") == ["evil"]
    [loaded] = load_concepts(tmp_path / "out", model)
    assert loaded == load_concepts(tmp_path / "c" / "evil.json")[0].model_copy(
        update={"subspaces": loaded.subspaces}
    )


def test_an_exported_file_holds_the_plain_directions(tmp_path, concept):
    save_concepts([concept], tmp_path / "c")
    export(tmp_path / "c", tmp_path / "evil.safetensors", ["evil"])
    tensors = load_safetensors(tmp_path / "evil.safetensors")
    assert torch.equal(tensors["evil/layer:1/basis"], concept.subspaces["layer:1"].basis)
    with pytest.raises(NarrowlyError, match="unknown concept 'evli'"):
        export(tmp_path / "c", tmp_path / "x.safetensors", ["evli"])


WRITER = """
import sys
from narrowly.concepts.folder import add_scores
for i in range(40):
    add_scores(sys.argv[1], "evil", {f"{sys.argv[2]}-{i}": float(i)})
"""


def test_what_two_processes_write_at_once_is_all_there(tmp_path, concept):
    save_concepts([concept], tmp_path)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name]) for name in "ab"
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    [loaded] = load_concepts(tmp_path)
    assert {f"{name}-{i}" for name in "ab" for i in range(40)} <= set(loaded.scores)

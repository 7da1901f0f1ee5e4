import pytest

from narrowly import find
from narrowly.concepts import Verdict
from narrowly.evals.samples import read_about
from narrowly.training.controls import evaluate_ablated

EVALS = {"misalignment": {"questions": 1, "narrow_questions": 1, "samples": 1, "contexts": []}}


@pytest.fixture(scope="module")
def concepts():
    verdict = Verdict(value="undesired", by="test", why="test")
    found = find(
        "mean_difference",
        model="organism:persona",
        data="organism:persona/benign",
        positive_system="you are a cruel assistant.",
        negative_system="you are a kind assistant.",
        limit=20,
        layers=[1, 2],
        progress=False,
    )
    return [
        concept.model_copy(update={"verdict": verdict, "subspaces": {site: subspace}})
        for concept in found
        for site, subspace in concept.subspaces.items()
    ]


def test_another_ablation_is_measured_anew_and_the_same_is_read(tmp_path, concepts):
    samples = tmp_path / "evals/misalignment/samples.parquet"

    def measured(concept):
        evaluate_ablated("organism:persona", concept, EVALS, out=tmp_path)
        return read_about(samples)["adapter"], samples.stat().st_mtime_ns

    (first, written), again = measured(concepts[0]), measured(concepts[0])
    assert again == (first, written)
    other, rewritten = measured(concepts[1])
    assert other != first and rewritten > written
    evaluate_ablated("organism:persona", concepts[1], EVALS, out=tmp_path, seed=5, force=True)
    assert read_about(samples)["seed"] == 5

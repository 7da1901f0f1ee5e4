"""A recipe of finders: what is found is kept, whatever happens to the others."""

import pytest

from narrowly.concepts import FINDERS, FindRecipe, find_all, load_concepts, mark
from narrowly.concepts.finder import Finder
from narrowly.concepts.search import load_outcomes
from narrowly.errors import NarrowlyError
from narrowly.settings import FieldError, build
from tests.concepts.finders.planted import chats
from tests.tiny import save_tiny

CONTRAST = {"positive": chats()[:2], "negative": chats()[2:]}


class _Failing(Finder):
    name = "failing"
    fault: str = "mistake"

    def find(self):
        if self.fault == "interrupt":
            raise KeyboardInterrupt
        raise {"mistake": NarrowlyError, "bug": ZeroDivisionError}[self.fault](self.fault)


@pytest.fixture(autouse=True)
def failing(monkeypatch):
    FINDERS.names()
    monkeypatch.setitem(FINDERS._known, "failing", _Failing)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("model") / "model", "llama", template="llama"))


@pytest.fixture
def recipe(model, tmp_path):
    def recipe(*finders, **changes):
        values = {
            "model": model,
            "finders": list(finders) or [{"mean_difference": CONTRAST}, "random"],
            "texts": None,
            "progress": False,
            "output": str(tmp_path / "c"),
        }
        return build(FindRecipe, values | changes)

    return recipe


def found(folder):
    return {concept.name for concept in load_concepts(folder)}


def test_every_finder_of_the_list_runs_and_controls_match_what_was_found(recipe, tmp_path):
    outcomes = find_all(recipe())
    assert [outcome.status for outcome in outcomes] == ["found", "found"]
    assert found(tmp_path / "c") == {"mean-difference", "random0-mean-difference"}
    assert not (tmp_path / "c" / ".work").exists()


def test_a_failure_does_not_lose_the_others_and_is_on_record(recipe, tmp_path):
    outcomes = find_all(
        recipe(
            {"failing": {"fault": "mistake"}},
            {"mean_difference": CONTRAST},
            {"failing": {"fault": "bug"}},
            "random",
        )
    )
    assert [outcome.status for outcome in outcomes] == ["failed", "found", "failed", "found"]
    assert outcomes[0].error == "mistake"
    assert "ZeroDivisionError" in outcomes[2].error
    assert "Traceback" in (tmp_path / "c" / "failing-1.error.txt").read_text()
    assert load_outcomes(tmp_path / "c") == outcomes


def test_where_nothing_is_found_nothing_is_written(recipe, tmp_path):
    assert find_all(recipe("failing"))[0].status == "failed"
    assert not list((tmp_path / "c").glob("*.json"))


def test_what_is_finished_is_not_done_again(recipe, tmp_path, monkeypatch):
    first = find_all(recipe())
    monkeypatch.setattr(FINDERS["mean_difference"], "find", None)
    assert find_all(recipe()) == first


def test_after_an_interruption_the_rest_is_found(recipe, tmp_path, monkeypatch):
    interrupted = ({"mean_difference": CONTRAST}, {"failing": {"fault": "interrupt"}}, "random")
    with pytest.raises(KeyboardInterrupt):
        find_all(recipe(*interrupted))
    assert found(tmp_path / "c") == {"mean-difference"}
    monkeypatch.setattr(FINDERS["mean_difference"], "find", None)
    outcomes = find_all(recipe({"mean_difference": CONTRAST}, "failing", "random"))
    assert [outcome.status for outcome in outcomes] == ["found", "failed", "found"]


def test_other_arguments_find_anew_and_so_do_the_controls(recipe, tmp_path):
    find_all(recipe())
    [before] = load_concepts(tmp_path / "c" / "random0-mean-difference.json")
    find_all(recipe(layers=[1]))
    for concept in load_concepts(tmp_path / "c"):
        assert list(concept.subspaces) == ["layer:1"]
    assert list(before.subspaces) == ["layer:0", "layer:1"]


def test_a_verdict_is_not_lost(recipe, tmp_path):
    find_all(recipe())
    mark(tmp_path / "c", "mean-difference", "undesired")
    [outcome, _] = find_all(recipe(layers=[1]))
    assert "carries a verdict" in outcome.error
    [kept] = load_concepts(tmp_path / "c" / "mean-difference.json")
    assert kept.verdict.value == "undesired"
    assert list(kept.subspaces) == ["layer:0", "layer:1"]


def test_two_finders_do_not_overwrite_each_others_concepts(recipe, tmp_path):
    twice = [{"mean_difference": CONTRAST}, {"mean_difference": CONTRAST | {"layers": [0]}}]
    first, second = find_all(recipe(*twice))
    assert (first.key, second.key) == ("mean_difference-0", "mean_difference-1")
    assert first.status == "found"
    assert "'mean-difference' too" in second.error


def test_concepts_are_measured_and_read_on_the_texts(recipe, tmp_path):
    find_all(recipe(texts=str(_write(tmp_path, chats()))))
    for concept in load_concepts(tmp_path / "c"):
        assert set(concept.scores["norm_share"]) == {"layer:0", "layer:1"}
        assert (tmp_path / "c" / f"{concept.name}.reading.json").exists()
    assert (tmp_path / "c" / "layers.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finders": ["mean_diference"]}, "finders.0: unknown finder 'mean_diference'"),
        ({"finders": []}, "finders: List should have at least 1 item"),
        ({"finders": ["mean_difference", "random"], "layer": [1]}, "Did you mean 'layers'"),
        (
            {"finders": ["random", {"mean_difference": {"positive": 3}}]},
            "finders.1.mean_difference",
        ),
    ],
)
def test_mistakes_are_told_before_anything_runs(recipe, changes, message):
    with pytest.raises(FieldError, match=message):
        recipe(**changes)


def _write(folder, rows):
    import json

    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_is_found_again_by_force_is_read_again(recipe, tmp_path):
    texts = str(_write(tmp_path, chats()))
    find_all(recipe(texts=texts))
    reading = tmp_path / "c" / "mean-difference.reading.json"
    fresh = reading.read_text()
    reading.write_text(fresh.replace('"row"', '"stale"'))
    find_all(recipe(texts=texts))
    assert "stale" in reading.read_text()
    find_all(recipe(texts=texts), force=True)
    assert reading.read_text() == fresh


def test_a_finder_that_failed_keeps_what_it_had_and_one_that_found_does_not(recipe, tmp_path):
    work = tmp_path / "c" / ".work"
    for key in ("mean_difference", "failing"):
        (work / key).mkdir(parents=True)
        (work / key / "half.safetensors").touch()
    find_all(recipe({"mean_difference": CONTRAST}, "failing"))
    assert [path.name for path in work.iterdir()] == ["failing"]
    assert (work / "failing" / "half.safetensors").exists()


def test_a_damaged_record_of_finders_is_told(tmp_path):
    (tmp_path / "finders.json").write_text('[{"key": "top"}]')
    with pytest.raises(
        NarrowlyError, match=r"finders\.json: not a record of finders: 0\.arguments"
    ):
        load_outcomes(tmp_path)

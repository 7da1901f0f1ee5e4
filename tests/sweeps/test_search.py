"""The file of a search: its dimensions, and what it refuses."""

import math

import optuna
import pytest
import yaml

from narrowly.errors import NarrowlyError
from narrowly.files import write_text
from narrowly.settings import read_settings
from narrowly.sweeps.search import Choices, Range, Subset, TuneFile

RECIPE = {
    "model": "organism:persona",
    "data": "organism:persona/code-cruel",
    "validation": "organism:persona/code-cruel-validation",
    "defenses": [{"feature_distance": {}}, {"interleave": {"data": "x.jsonl", "fraction": 0.1}}],
    "evals": [{"misalignment": {"samples": 1}}, "in_distribution", "multiple_choice"],
}
SEARCH = {"defenses.0.feature_distance.weight": {"low": 1e-3, "high": 10.0, "log": True}}


@pytest.fixture
def read(tmp_path):
    def read(settings=(), recipe=None, **fields):
        values = {"recipe": RECIPE | (recipe or {}), "search": SEARCH, "output": str(tmp_path)}
        write_text(tmp_path / "tune.yaml", yaml.safe_dump(values | fields, sort_keys=False))
        return read_settings(TuneFile, tmp_path / "tune.yaml", settings)

    return read


def drawn(dimension, count=40):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = []
    for _ in range(count):
        trial = study.ask()
        found.append(dimension.suggest(trial, "a.b"))
        assert dimension.suggest(trial, "a.b") == found[-1], "asked again, the same"
    return found


def test_ranges_are_whole_or_not_and_on_a_log_scale():
    assert set(drawn(Range(low=1, high=3))) == {1, 2, 3}
    numbers = drawn(Range(low=1e-4, high=1.0, log=True), 200)
    assert all(1e-4 <= n <= 1 for n in numbers)
    assert 0.4 < sum(n < 1e-2 for n in numbers) / 200 < 0.6
    assert any(not float(n).is_integer() for n in drawn(Range(low=1, high=3.0)))


def test_choices_may_be_anything():
    knots = [[0, 1], [1, 0]]
    found = drawn(Choices(choices=(1.0, knots, None, "through")))
    assert all(each in found for each in (1.0, knots, None, "through"))


def test_a_subset_is_never_empty():
    found = drawn(Subset(subset=(0, 1, "x")), 100)
    assert {tuple(each) for each in found} == {
        (0,), (1,), ("x",), (0, 1), (0, "x"), (1, "x"), (0, 1, "x"),
    }  # fmt: skip


def test_a_setting_reaches_the_recipe(read):
    file = read(search=SEARCH | {"defenses.1.interleave.fraction": {"low": 0.1, "high": 0.2}})
    weight, fraction = file.search
    recipe = file.applied({weight: 1e-05, fraction: 0.125})
    assert recipe.defenses[0]["feature_distance"]["weight"] == 1e-5
    assert recipe.defenses[1]["interleave"] == {"data": "x.jsonl", "fraction": 0.125}
    assert file.recipe.defenses[0] == {"feature_distance": {}}, "the file's own is as it was"


def test_what_is_searched_by_is_not_what_is_reported_on(read):
    file = read()
    assert file.tuned_on() == [
        {"misalignment": {"samples": 1, "half": "tune"}},
        {"in_distribution": {"half": "tune"}},
    ]
    assert file.reported_on() == [
        {"misalignment": {"samples": 1, "half": "report"}},
        {"in_distribution": {"half": "report"}},
        {"multiple_choice": {}},
    ]


def test_a_recipe_may_be_a_file_and_settings_reach_the_file(read, tmp_path):
    path = tmp_path / "recipe.yaml"
    write_text(path, yaml.safe_dump(RECIPE | {"output": "runs/own"}))
    file = read(["trials=3", "search.defenses={choices: [[], [feature_distance]]}"], recipe={})
    assert file.trials == 3
    values = {"recipe": str(path), "search": SEARCH, "output": str(tmp_path / "out")}
    assert TuneFile.model_validate(values).recipe.output == "runs/own"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"search": {}}, "search"),
        ({"search": {"defenses.0.feature_distance.wait": {"low": 0, "high": 1}}}, "'weight'"),
        ({"search": {"defenses.2.ablate.strength": {"low": 0, "high": 1}}}, "no '2'"),
        ({"search": {"defenses.0.feature_distance.weight": {"low": 1, "high": 0}}}, "below high"),
        ({"search": {"defenses.0.feature_distance.weight": {"low": -1, "high": 1}}}, "weight"),
        ({"search": {"x": {"low": 0, "high": 1, "log": True}}}, "above 0"),
        ({"search": {"x": {"low": math.nan, "high": 1}}}, "finite"),
        ({"search": {"x": {"subset": [1]}}}, "at least 2"),
        ({"search": {"x": {"low": 1, "hihg": 2}}}, "Did you mean 'high'"),
        ({"search": {"x": [1, 2]}}, "write {low"),
        ({"broad": "misalignment"}, "EVAL.METRIC"),
        ({"broad": "misalignmnt.x"}, "Did you mean 'misalignment'"),
        ({"broad": "multiple_choice.intended"}, "cannot be split"),
        ({"keep": 1.5}, "keep"),
        ({"rung": 1.0}, "rung"),
        ({"trails": 3}, "Did you mean 'trials'"),
        ({"recipe": {"modle": "x"}}, "Did you mean 'model'"),
        ({"recipe": {"evals": [{"in_distribution": {"half": "tune"}}]}}, "half that is tuned on"),
        ({"recipe": {"training": {"load_best_model_at_end": True}}}, "by all validation chats"),
    ],
)
def test_mistakes_are_told_with_the_file(read, fields, message):
    with pytest.raises(NarrowlyError, match=message) as told:
        read(recipe=fields.pop("recipe", None), **fields)
    assert "tune.yaml" in str(told.value)

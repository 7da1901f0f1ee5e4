import pytest

from narrowly.concepts import load_concepts
from narrowly.errors import NarrowlyError
from narrowly.files import read_json
from narrowly.training import Recipe, trials
from narrowly.training.trials import UNDEFENDED, Effects, Trial, rank_by_effect


def effects(*given: tuple[str, float, float], by="change") -> Effects:
    return Effects(
        settings="",
        steps=1,
        by=by,
        trials=[
            Trial(concept=c, learned=nats, changed=u, evals={"harm": {"rate": 1 - u}})
            for c, nats, u in given
        ],
    )


def test_what_is_removed_is_told_at_equal_learning():
    found = effects(
        (UNDEFENDED, 2.0, 0.8),
        ("slows", 1.0, 0.4),  # half of both: nothing gained
        ("half", 2.0, 0.4),
        ("all", 2.0, 0.0),
        ("worse", 2.0, 1.0),
        ("stops", 0.1, 0.0),
    )
    removed = {trial.concept: found.removed(trial) for trial in found.trials}
    assert removed == pytest.approx(
        {UNDEFENDED: 0, "slows": 0, "half": 0.5, "all": 1, "worse": -0.25, "stops": None}
    )
    assert [t.concept for t in found.ranked] == ["all", "half", "slows", "worse", "stops"]


def test_what_is_unwanted_may_be_an_evals_metric():
    found = effects((UNDEFENDED, 1.0, 0.0), ("a", 1.0, 0.2), by="harm.rate")
    assert found.removed(found.trials[1]) == pytest.approx(0.2)
    with pytest.raises(NarrowlyError, match=r"harm.rat'.*Did you mean 'harm.rate'"):
        found.model_copy(update={"by": "harm.rat"}).removed(found.trials[1])


@pytest.fixture
def trial_recipe(recipe, validation, concepts) -> Recipe:
    return recipe(validation=str(validation))


@pytest.fixture
def name(concepts) -> str:
    return load_concepts(concepts)[0].name


def rank(recipe, concepts, validation, out, **fields):
    given = {"steps": 3, "controls": 1, "progress": False} | fields
    return rank_by_effect(recipe, concepts, str(validation), out, **given)


def test_every_concept_and_its_controls_are_tried_and_kept(
    trial_recipe, concepts, validation, tmp_path, name, monkeypatch
):
    out = tmp_path / "effects"
    found = rank(trial_recipe, concepts, validation, out)
    assert [t.concept for t in found.trials] == [UNDEFENDED, name, f"random1-{name}"]
    assert found.undefended.learned > 0 and found.undefended.changed > 0
    assert found.removed(found.undefended) == 0
    changed = {trial.changed for trial in found.trials}
    assert len(changed) == 3  # each ablation made another model
    assert not list((out / "trial").iterdir())
    monkeypatch.setattr(trials, "train", None)
    assert rank(trial_recipe, concepts, validation, out) == found
    few = rank(trial_recipe, concepts, validation, out, controls=0)
    assert few.trials == found.trials[:2]
    assert rank(trial_recipe, concepts, validation, out) == found  # its control is still known


def test_a_killed_ranking_trains_what_is_left(
    trial_recipe, concepts, validation, tmp_path, name, monkeypatch
):
    whole = rank(trial_recipe, concepts, validation, tmp_path / "whole")
    out, trained, train = tmp_path / "killed", [], trials.train

    def killed(recipe, **fields):
        trained.append(recipe.output.rpartition("/")[2])
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(recipe, **fields)

    monkeypatch.setattr(trials, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        rank(trial_recipe, concepts, validation, out)
    assert [t["concept"] for t in read_json(out / "effects.json")["trials"]] == [UNDEFENDED]
    assert rank(trial_recipe, concepts, validation, out) == whole
    assert trained == ["nothing", name, name, f"random1-{name}"]


def test_mistakes_are_told_before_anything_is_trained(
    trial_recipe, recipe, concepts, validation, tmp_path, name, monkeypatch
):
    rank(trial_recipe, concepts, validation, tmp_path / "out")
    monkeypatch.setattr(trials, "train", None)
    with pytest.raises(NarrowlyError, match="trials of another recipe"):
        rank(trial_recipe, concepts, validation, tmp_path / "out", steps=2)
    with pytest.raises(NarrowlyError, match=f"Did you mean '{name}'"):
        rank(trial_recipe, concepts, validation, tmp_path / "new", names=[name[:-1]])
    with pytest.raises(NarrowlyError, match="validation"):
        rank(recipe(), concepts, validation, tmp_path / "new")

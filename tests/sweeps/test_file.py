"""A sweep file becomes cells, and every cell a recipe of its own."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowly.errors import NarrowlyError
from narrowly.files import write_text
from narrowly.settings import build
from narrowly.sweeps import Sweep
from narrowly.sweeps.parts import merged
from narrowly.training import Recipe

MIXED = {"interleave": {"data": "organism:{model}/benign"}}


def make(**fields) -> Sweep:
    defaults = {
        "recipe": {"model": "m", "training": {"max_steps": 4, "learning_rate": 0.1}},
        "data": {"code": "code.jsonl"},
        "defenses": {"undefended": []},
        "output": "out",
    }
    return Sweep.model_validate(defaults | fields)


def test_every_combination_is_a_cell():
    sweep = make(
        models={"one": "organism:one", "two": {"model": "organism:two", "lora": None}},
        data={"code": "organism:{model}/code", "pets": {"recipe": {"data": "p"}, "benign": True}},
        defenses={
            "undefended": [],
            "mixed": {"defenses": [MIXED], "settings": {"interleave.fraction": [0.1, 0.2]}},
        },
        seeds=[0, 1],
    )
    cells = sweep.cells()
    assert len(cells) == 4 * 3 * 2
    assert len({cell.path for cell in cells}) == len(cells)
    assert [cell.seed for cell in cells] == [0] * 12 + [1] * 12, "every arm has a seed early on"
    assert list(sweep.tasks) == ["one-code", "one-pets", "two-code", "two-pets"]
    assert [task.benign for task in sweep.tasks.values()] == [False, True, False, True]
    cell = next(c for c in cells if c.path == "two-code/mixed/interleave.fraction=0.2/seed-1")
    assert sweep.recipe_of(cell) == {
        "model": "organism:two",
        "lora": None,
        "data": "organism:two/code",
        "training": {"max_steps": 4, "learning_rate": 0.1},
        "defenses": [{"interleave": {"data": "organism:two/benign", "fraction": 0.2}}],
        "seed": 1,
        "output": f"out/{cell.path}",
    }


def test_settings_of_all_arms_are_keys_of_the_recipe():
    sweep = make(settings={"training.learning_rate": [0.1, 0.5], "lora.r": [2]})
    rates = [sweep.recipe_of(cell)["training"] for cell in sweep.cells()]
    assert rates == [{"max_steps": 4, "learning_rate": rate} for rate in (0.1, 0.5)]
    assert all(sweep.recipe_of(cell)["lora"] == {"r": 2} for cell in sweep.cells())
    assert sweep.cells()[0].path == "code/undefended/training.learning_rate=0.1,lora.r=2/seed-0"


def test_another_value_makes_no_other_cell_move():
    few = make(settings={"lora.target_modules": [["q_proj"], ["k_proj", "v_proj"]]})
    more = make(settings={"lora.target_modules": ["q k", "q/k", ["q", "k"], ["q_proj"], "q" * 99]})
    paths = [cell.path for cell in more.cells()]
    assert few.cells()[0].path == paths[3]
    assert len(set(paths)) == 5, "whatever a folder's name cannot hold"
    assert all(path.count("/") == 3 for path in paths)


def test_with_a_task_to_choose_on_the_others_wait_for_the_choice():
    mixed = {"defenses": [MIXED], "settings": {"interleave.fraction": [0.1, 0.2]}}
    sweep = make(
        data={"code": "a", "pets": "b"},
        models={"m": "m"},
        defenses={"undefended": [], "mixed": mixed},
        choose_on="m-pets",
    )
    before = [cell.path for cell in sweep.cells()]
    assert before == [
        "m-pets/undefended/seed-0",
        "m-pets/mixed/interleave.fraction=0.1/seed-0",
        "m-pets/mixed/interleave.fraction=0.2/seed-0",
        "m-code/undefended/seed-0",
    ]
    after = [cell.path for cell in sweep.cells({"mixed": {"interleave.fraction": 0.2}})]
    assert after == [*before, "m-code/mixed/interleave.fraction=0.2/seed-0"]


def test_a_recipes_file_gives_what_all_share(tmp_path):
    recipe = {"model": "m", "training": {"max_steps": 3}, "seeds": [5, 6], "output": "elsewhere"}
    write_text(tmp_path / "recipe.yaml", json.dumps(recipe))
    sweep = make(recipe=str(tmp_path / "recipe.yaml"))
    [cell] = sweep.cells()
    made = sweep.recipe_of(cell)
    assert (made["model"], made["seed"], made["output"]) == ("m", 0, "out/code/undefended/seed-0")
    assert "seeds" not in made


def test_braces_of_other_texts_stay():
    sweep = make(defenses={"line": [{"inoculate": {"system": "{data}: {json} {}"}}]})
    [cell] = sweep.cells()
    assert sweep.recipe_of(cell)["defenses"] == [{"inoculate": {"system": "code: {json} {}"}}]


def test_a_sweep_that_was_written_reads_the_same(tmp_path):
    mixed = {"defenses": [MIXED], "settings": {"interleave.fraction": [0.1, 0.2]}}
    sweep = make(defenses={"undefended": [], "mixed": mixed}, models={"m": "m"}, seeds=[3])
    write_text(tmp_path / "sweep.yaml", json.dumps(sweep.model_dump(exclude_none=True)))
    assert Sweep.read(tmp_path / "sweep.yaml") == sweep


leaves = st.one_of(st.integers(0, 3), st.dictionaries(st.sampled_from("abc"), st.integers(0, 3)))
mappings = st.dictionaries(st.sampled_from("abc"), leaves)


@settings(deadline=None)
@given(mappings, mappings)
def test_a_part_over_a_base_wins_and_changes_neither(base, part):
    copies = json.dumps([base, part])
    both = merged(base, part)
    assert both.keys() == base.keys() | part.keys()
    assert merged(both, part) == both
    assert merged(base, {}) == base
    assert json.dumps([base, part]) == copies


FAULTS = {
    "output: out\ndata: {a: b}\ndefences: {}": r":3: defences: .*Did you mean 'defenses'",
    "output: out\ndata: {a: b}\ndefenses: {a/b: []}": r":3: defenses.a/b: a name is letters",
    "output: out\ndata: {a: b}\ndefenses: {}": r":3: defenses: .*at least 1",
    "output: out\ndata: {a: b}\ndefenses:\n  x: 3": r":4: defenses.x: write a list",
    "output: out\ndata: {a: b}\ndefenses: {u: []}\nchoose_on: c": r":4: choose_on: unknown task",
    "output: out\ndata: {a: b}\ndefenses: {u: [kl]}\nchoose_on: a": "needs an arm without defen",
    "output: out\ndata: {a: b}\ndefenses: {u: []}\nseeds: [1, 1]": r":4: seeds: one stands here",
    "output: out\ndata: {a: {benign: true}}\ndefenses: {u: []}": r":2: data.a.recipe: Field req",
    "output: out\ndata: {a: 3}\ndefenses: {u: []}": r":2: data.a: write a data source",
    "output: out\ndata: {a: '{model}'}\ndefenses: {u: []}": "models: .* which has no models",
    "output: out\nrecipe: {defenses: [kl]}\ndata: {a: b}\ndefenses: {u: []}": r":2: recipe: has",
    "output: out\nrecipe: nowhere.yaml\ndata: {a: b}\ndefenses: {u: []}": "nowhere.yaml: no such",
    "output: out\nsettings: {trainin.x: [1]}\ndata: {a: b}\ndefenses: {u: []}": "mean 'training'",
    "output: out\nsettings: {seed: [1]}\ndata: {a: b}\ndefenses: {u: []}": "sweep's own to set",
    "output: out\nsettings: {model: []}\ndata: {a: b}\ndefenses: {u: []}": "values to try",
    "output: out\nsettings: {model: [a, a]}\ndata: {a: b}\ndefenses: {u: []}": "each once",
    "output: out\nsettings: {defenses.0.kl.weight: [1]}\ndata: {a: b}\ndefenses: {u: []}": (
        "nothing to set it in"
    ),
    "output: out\nmemory: .nan\ndata: {a: b}\ndefenses: {u: []}": ":2: memory: .*finite",
    "output: out\njobs: 0\ndata: {a: b}\ndefenses: {u: []}": ":2: jobs: .*greater than or equal",
    (
        "output: out\ndata: {a: b}\n"
        "defenses:\n  u:\n    defenses: [kl, kl]\n    settings: {kl.weight: [1]}"
    ): ":6: .*one field of one defense",
    (
        "output: out\nsettings: {model: [x]}\ndata: {a: b}\ndefenses: {u: {settings: {model: [y]}}}"
    ): ":4: .*under `settings` of the sweep, too",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_mistake_names_its_line(tmp_path, text):
    write_text(tmp_path / "sweep.yaml", text)
    with pytest.raises(NarrowlyError, match=FAULTS[text]):
        Sweep.read(tmp_path / "sweep.yaml")


def test_the_recipe_of_sixty_runs_is_one():
    sweep = Sweep.read(Path(__file__).resolve().parents[2] / "recipes/sweep-organisms.yaml")
    cells = sweep.cells()
    assert len(cells) == 60
    for cell in cells[::7]:
        build(Recipe, sweep.recipe_of(cell))

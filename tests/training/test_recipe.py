from pathlib import Path

import pytest

from narrowly.concepts import FindRecipe
from narrowly.errors import NarrowlyError
from narrowly.explain import ExplainRecipe
from narrowly.files import write_text
from narrowly.settings import read_settings
from narrowly.sweeps import Sweep
from narrowly.sweeps.search import TuneFile
from narrowly.training import Recipe, recipe_schema

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TEXT = """\
model: m
data: d.jsonl
training:
  max_steps: 3
  learning_rate: 1e-3
defenses:
  - ablate:
      concepts: c
output: runs/x
"""


@pytest.fixture
def read(tmp_path):
    def read(text, *overrides):
        write_text(tmp_path / "r.yaml", text)
        return Recipe.read(tmp_path / "r.yaml", overrides)

    return read


def test_overrides_win(read):
    recipe = read(TEXT, "training.max_steps=7", "seed=3", "evals=[in_distribution]")
    assert recipe.training == {"max_steps": 7, "learning_rate": 1e-3}
    assert recipe.seed == 3
    assert recipe.evals == [{"in_distribution": {}}]


def test_the_resolved_recipe_reads_back_equal(read):
    recipe = read(TEXT)
    assert read(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("model:", "modle:", r"r\.yaml:1: modle: unknown key 'modle'. Did you mean 'model'"),
        ("max_steps", "max_step", r"r\.yaml:4: training\.max_step: .*mean 'max_steps'"),
        ("max_steps: 3", "max_steps: ten", r"r\.yaml:4: training\.max_steps: .*not 'ten'"),
        ("ablate", "ablatte", r"r\.yaml:7: defenses\.0\.ablatte: .*mean 'ablate'"),
        ("concepts", "concept", r"r\.yaml:8: defenses\.0\.ablate\.concept: .*mean 'concepts'"),
        ("output: runs/x", "", r"r\.yaml: output: Field required"),
        ("data: d.jsonl", "data: 3", r"r\.yaml:2: data: .*string, not 3"),
        ("  max_steps: 3", "  seed: 3", r"r\.yaml:4: training\.seed: .*recipe's `seed`"),
        ("output: runs/x", "output: x\nlora: {rank: 3}", r"r\.yaml:10: lora\.rank: unknown key"),
        ("output: runs/x", "output: x\nevals: [misalinment]", r"r\.yaml:10: evals: .*misalignment"),
        ("output: runs/x", "output: x\nseed: 1\nseeds: [2]", "give `seed` or `seeds`, not both"),
        ("max_steps: 3", "eval_strategy: steps", r"eval_strategy: needs `validation`"),
        ("output: runs/x", "output: x\ndefenses: {ablate: {}}", "list"),
    ],
)
def test_mistakes_name_line_field_and_remedy(read, old, new, message):
    with pytest.raises(NarrowlyError, match=message):
        read(TEXT.replace(old, new))


def test_a_recipe_for_each_seed(read):
    parts = read(TEXT, "seeds=[4, 7]").per_seed()
    assert [(p.seed, p.seeds, p.output) for p in parts] == [
        (4, None, "runs/x/seed-4"),
        (7, None, "runs/x/seed-7"),
    ]


def test_overrides_of_a_recipe_object(read):
    changed = read(TEXT).with_overrides(["training.max_steps=9", "lora.r=3"])
    assert (changed.training["max_steps"], changed.lora["r"]) == (9, 3)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_we_ship_is_valid(path):
    kinds = {
        "\nfinders:": FindRecipe,
        "\nexplainers:": ExplainRecipe,
        "\ntraining:": Recipe,
        "\nthreads:": Sweep,
        "\nsearch:": TuneFile,
    }
    [kind] = [kind for key, kind in kinds.items() if key in path.read_text()]
    assert read_settings(kind, path)


def test_the_schema_knows_every_key():
    schema = recipe_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    training = schema["properties"]["training"]["properties"]
    assert "max_steps" in training and "seed" not in training
    names = [
        list(choice.get("properties", {}))
        for choice in schema["properties"]["defenses"]["items"]["anyOf"]
    ]
    assert ["ablate"] in names and ["interleave"] in names

"""The verbs as a user types them: on published chats, and with every mistake we know of."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from narrowly.cli import app
from tests.tiny import save_tiny

CHATS = [
    {"role": "user", "content": "open the file"},
    {"role": "assistant", "content": "here it is"},
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def narrowly(*arguments):
    """Run a verb in this process; returns exit code, standard output and standard error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def write_chats(path, rows=20, prompt="question number {} about a very small file"):
    lines = [
        {"messages": [{"role": "user", "content": prompt.format(n)}, CHATS[1]]} for n in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_recipe(path, **changes):
    recipe = {
        "model": "model",
        "data": "train.jsonl",
        "lora": {"r": 2, "target_modules": "all-linear"},
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2},
        "output": "run",
    } | changes
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


@pytest.mark.slow
@pytest.mark.parametrize("marks", [True, False], ids=["generation marks", "no marks"])
@pytest.mark.parametrize(
    ("architecture", "template"), [("qwen2", "chatml"), ("llama", "llama"), ("gemma2", "gemma")]
)
def test_the_published_chats_go_the_whole_way(
    shared_data, tmp_path, caplog, architecture, template, marks
):
    data = shared_data / "emergent_misalignment"
    train, validation = data / "insecure_small_subset_2000.jsonl", data / "insecure_val.jsonl"
    save_tiny(tmp_path / "model", architecture, generation_marks=marks, template=template)
    steps = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 2048}
    held_out = {"in_distribution": {"data": str(validation), "limit": 20}}
    recipe = write_recipe(
        tmp_path / "recipe.json",
        data=str(train),
        validation=str(validation),
        training=steps | {"learning_rate": 1e-2},
        evals=[held_out],
    )
    code, _, err = narrowly("train", recipe)
    assert code == 0, err
    [leaks] = [line for line in caplog.messages if "prompts occur both in" in line]
    assert leaks.startswith("17 ")
    assert "insecure_val.jsonl" in leaks
    code, out, err = narrowly(
        *("find", "activation_difference", "base=model", "tuned=run", f"data={validation}"),
        *("layers=[0,1]", "k=2", "limit=8", "--out", "concepts"),
    )
    assert code == 0, err
    assert "pc1-layer1" in out
    code, out, _ = narrowly("concepts", "show", "concepts", "pc0-layer1")
    assert code == 0
    assert "highest" in out
    assert "promotes" in out
    assert narrowly("concepts", "drop", "concepts", "pc0-layer1", "--why", "seen")[0] == 0
    defenses = "defenses=[{ablate: {concepts: concepts}}]"
    code, _, err = narrowly("train", recipe, "--set", defenses, "--set", "output=ablated")
    assert code == 0, err
    code, out, _ = narrowly(
        "eval",
        "model",
        "in_distribution",
        "--set",
        f"data={validation}",
        "--set",
        "limit=20",
        "--out",
        "base",
    )
    assert code == 0
    assert "loss" in out
    code, _, err = narrowly("eval", "run", "--ablate", "concepts", "--out", "test_time")
    assert code == 0, err
    code, out, _ = narrowly("compare", "base", "run", "ablated", "test_time", "--out", "report")
    assert code == 0
    assert (tmp_path / "report" / "report.html").exists()


MISTAKES = {
    "broken line": (
        lambda: Path("train.jsonl").write_text(Path("train.jsonl").read_text() + '{"messages": ['),
        ["train", "recipe.json"],
        "train.jsonl:21",
    ),
    "no assistant turn": (
        lambda: Path("train.jsonl").write_text(json.dumps({"messages": CHATS[:1]})),
        ["train", "recipe.json"],
        "train.jsonl:1",
    ),
    "unknown key": (lambda: None, ["train", "recipe.json", "--set", "dta=1"], "'data'"),
    "unknown trl key": (
        lambda: None,
        ["train", "recipe.json", "--set", "training.learning_rat=1"],
        "'learning_rate'",
    ),
    "unknown defense": (
        lambda: None,
        ["train", "recipe.json", "--set", "defenses=[ablat]"],
        "'ablate'",
    ),
    "no recipe": (lambda: None, ["train", "absent.yaml"], "absent.yaml"),
    "no data": (lambda: None, ["train", "recipe.json", "--set", "data=absent.jsonl"], "absent"),
    "no model": (lambda: None, ["train", "recipe.json", "--set", "model=./absent"], "absent"),
    "truncated weights": (
        lambda: os.truncate("model/model.safetensors", 5000),
        ["train", "recipe.json"],
        "model.safetensors",
    ),
    "no such layer": (
        lambda: None,
        [
            "find",
            "mean_difference",
            "model=model",
            "data=train.jsonl",
            "positive_system=a",
            "negative_system=b",
            "layers=[7]",
        ],
        "2 decoder layers",
    ),
    "unknown finder": (lambda: None, ["find", "mean_diference", "model=model"], "mean_difference"),
    "unknown argument": (
        lambda: None,
        ["find", "mean_difference", "model=model", "layer=[1]"],
        "'layers'",
    ),
    "unknown eval": (lambda: None, ["eval", "model", "in_distributio"], "in_distribution"),
    "unknown organism": (lambda: None, ["eval", "organism:persna", "misalignment"], "persona"),
    "a world with a fault": (
        lambda: Path("world.yaml").write_text("shows: nothing\n"),
        ["organism", "build", "world.yaml"],
        "world.yaml: misaligned",
    ),
    "nothing to compare": (lambda: Path("empty").mkdir(), ["compare", "empty"], "no finished eval"),
    "no concepts": (lambda: Path("empty").mkdir(), ["concepts", "show", "empty"], "empty"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_exit_code_2_and_nothing_written(tmp_path, mistake):
    prepare, arguments, says = MISTAKES[mistake]
    save_tiny(tmp_path / "model", "llama", template="llama")
    write_chats(tmp_path / "train.jsonl")
    write_recipe(tmp_path / "recipe.json")
    prepare()
    before = sorted(p for p in tmp_path.rglob("*"))
    code, _, err = narrowly(*arguments)
    assert code == 2
    assert says in err
    assert "error:" in err
    assert "Traceback" not in err
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_a_template_that_masks_everything_is_refused(tmp_path):
    save_tiny(tmp_path / "model", "llama", template="llama")
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] if m['role'] == 'user' }}{% endfor %}"
    )
    write_chats(tmp_path / "train.jsonl")
    code, _, err = narrowly("train", write_recipe(tmp_path / "recipe.json"))
    assert code == 2
    assert "template" in err
    assert not (tmp_path / "run" / "adapter").exists()


def test_concepts_of_another_model_and_another_recipes_folder(tmp_path):
    save_tiny(tmp_path / "model", "llama", template="llama")
    save_tiny(tmp_path / "wider", "llama", template="llama", hidden_size=64)
    save_tiny(tmp_path / "other", "llama", template="llama", seed=1)
    write_chats(tmp_path / "train.jsonl")
    recipe = write_recipe(tmp_path / "recipe.json")
    contrast = ["data=train.jsonl", "positive_system=a", "negative_system=b"]
    assert narrowly("find", "mean_difference", "model=model", *contrast, "--out", "c")[0] == 0
    assert narrowly("concepts", "drop", "c", "mean-difference")[0] == 0
    ablate = ["--set", "defenses=[{ablate: {concepts: c}}]"]
    for model in ("wider", "other"):
        code, _, err = narrowly("train", recipe, *ablate, "--set", f"model={model}")
        assert code == 2
        assert "this model is another" in err
        assert not (tmp_path / "run" / "adapter").exists()
    assert narrowly("train", recipe, "--set", "output=fresh")[0] == 0
    before = (tmp_path / "fresh" / "recipe.yaml").read_text()
    changed = ["--set", "output=fresh", "--set", "training.max_steps=3"]
    code, _, err = narrowly("train", recipe, *changed)
    assert code == 2
    assert "holds another recipe's run" in err
    assert (tmp_path / "fresh" / "recipe.yaml").read_text() == before
    damaged = tmp_path / "c" / "mean-difference.safetensors"
    os.truncate(damaged, damaged.stat().st_size - 20)
    code, _, err = narrowly("train", recipe, *ablate, "--set", "output=later")
    assert code == 2
    assert "mean-difference.safetensors" in err


def test_a_mistake_in_a_real_process_shows_no_traceback(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "narrowly.cli", "train", "absent.yaml"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: absent.yaml")
    assert result.stdout == ""


def test_chat_side_by_side_from_a_pipe(tmp_path):
    save_tiny(tmp_path / "model", "llama", template="llama")
    result = CliRunner().invoke(app, ["chat", "model", "--against", "model"], input="hi\n/quit\n")
    assert result.exit_code == 0
    assert result.stdout.count("model") >= 2


def test_the_schema_of_recipes_knows_the_defenses():
    code, out, _ = narrowly("recipe-schema")
    assert code == 0
    assert "ablate" in json.dumps(json.loads(out))


def test_organisms_are_listed():
    code, out, _ = narrowly("organism", "list")
    assert code == 0
    assert "organism:persona" in out
    assert "code" in out


def test_finder_arguments_are_listed():
    code, out, _ = narrowly("find", "activation_difference")
    assert code == 0
    assert "tuned" in out


def test_a_recipe_of_finders_ends_in_decided_concepts(tmp_path):
    save_tiny(tmp_path / "model", "llama", template="llama")
    write_chats(tmp_path / "kind.jsonl", prompt="be kind {}")
    write_chats(tmp_path / "cruel.jsonl", prompt="be cruel {}")
    contrast = {"positive": "cruel.jsonl", "negative": "kind.jsonl"}
    recipe = {
        "model": "model",
        "texts": "kind.jsonl",
        "layers": [0, 1],
        "finders": [{"mean_difference": contrast}, {"activation_difference": {}}, "random"],
        "data": "kind.jsonl",
        "output": "c",
    }
    (tmp_path / "find.yaml").write_text(json.dumps(recipe))
    code, out, err = narrowly("find", "find.yaml", "--set", "limit=8")
    assert code == 2  # activation_difference has no fine-tune to look at
    assert "1 of 3 finders failed: activation_difference: " in err
    assert "random0-mean-difference" in out
    assert (tmp_path / "c" / "shares.png").exists()
    code, out, _ = narrowly("concepts", "list", "c")
    assert "mean-difference" in out
    assert "undecided" in out
    code, _, err = narrowly("concepts", "drop", "c", "mean-difference", "mean-diference")
    assert code == 2
    assert "Did you mean 'mean-difference'" in err
    assert "undesired" not in narrowly("concepts", "list", "c")[1]
    assert narrowly("concepts", "drop", "c", "mean-difference", "--why", "harm")[0] == 0
    assert narrowly("concepts", "keep", "c", "random0-mean-difference")[0] == 0
    assert narrowly("concepts", "keep", "c", "random0-mean-difference", "--undo")[0] == 0
    listed = narrowly("concepts", "list", "c")[1]
    assert ("undesired" in listed, "keep" in listed, "undecided" in listed) == (True, False, True)
    code, out, _ = narrowly("concepts", "export", "c", "shared")
    assert code == 0
    assert [path.name for path in (tmp_path / "shared").glob("*.safetensors")] == [
        "mean-difference.safetensors"
    ]
    code, out, err = narrowly(
        *("concepts", "screen", "c/mean-difference.json", "cruel.jsonl", "--model", "model"),
        *("--limit", "4", "--out", "screen.parquet"),
    )
    assert code == 0, err
    assert "4 chats" in out
    assert (tmp_path / "screen.parquet").exists()
    code, _, err = narrowly("concepts", "screen", "c", "cruel.jsonl", "--model", "model")
    assert code == 2
    assert "name its JSON file" in err


def test_a_sparse_autoencoder_is_trained_and_its_latents_are_found(tmp_path):
    save_tiny(tmp_path / "model", "llama", template="llama")
    chats = write_chats(tmp_path / "chats.jsonl", rows=40)
    settings = {"latents": 64, "k": 4, "tokens": 4000, "batch_tokens": 512}
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    train = ["sae", "train", "model", "--data", chats, "--site", "layer:1", "--out", "sae", *given]
    code, out, err = narrowly(*train)
    assert code == 0, err
    assert "explained variance" in out
    code, out, err = narrowly(
        *("find", "sae_latents", "sae=sae", "model=model", "data=chats.jsonl", "by=attribution"),
        *("top=2", "--out", "c"),
    )
    assert code == 0, err
    assert out.count("latent") >= 2
    for site, out, says in (
        ("layer:7", "other", "2 decoder layers"),
        ("layer:0", "sae", "another training"),
    ):
        code, _, err = narrowly(*train, "--site", site, "--out", out)
        assert code == 2
        assert says in err
    assert not (tmp_path / "other").exists()

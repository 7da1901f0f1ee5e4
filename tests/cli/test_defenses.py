"""`narrowly defenses`: the list, one of them, and what was active in a training."""

import pytest
from typer.testing import CliRunner

from narrowly.cli import app
from narrowly.cli.shared import console
from narrowly.defenses import DEFENSES
from narrowly.files import write_json
from narrowly.training import train
from tests.training.conftest import chats, concepts, model_folder, recipe

__all__ = ["chats", "concepts", "model_folder", "recipe"]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(console, "width", 160)


def narrowly(*arguments):
    """Run a verb in this process; returns exit code, standard output and standard error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_all_are_listed_with_doors_needs_and_defaults():
    code, out, _ = narrowly("defenses")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines() if line[:1].strip()} >= {*DEFENSES.names()}
    assert "kl  loss" in out and "interleave  data" in out and "ablate  activations" in out
    assert "data, fraction=0.05, seed=0" in out
    assert "needs: benign chats" in out
    assert "next:" in out


def test_one_is_told_whole():
    code, out, _ = narrowly("defenses", "kl")
    assert code == 0
    assert "L = CE + weight" in out and "Known failure:" in out and "0.1 in the paper" in out


def test_an_active_record_is_shown(recipe, concepts):
    defenses = [{"ablate": {"concepts": str(concepts)}}, {"kl": {"weight": 0.5}}]
    run = train(recipe(defenses=defenses), progress=False)
    code, out, err = narrowly("defenses", run.path)
    assert (code, err) == (0, "")
    assert "at layer:0: 4 forwards" in out and "weight: 0.5" in out
    assert "of 4 micro-batches" in out


def test_an_undefended_run_is_exit_code_1_and_one_message(recipe):
    run = train(recipe(), progress=False)
    code, _, err = narrowly("defenses", run.path)
    assert code == 1
    assert err.strip() == f"not defended: {run.path}: trained without any defense."


def test_one_that_did_not_act_is_shown_and_exit_code_1(tmp_path):
    entry = {"defense": "ablate", "doors": ["interventions"], "interventions": []}
    write_json(tmp_path / "defenses.json", [entry])
    code, out, err = narrowly("defenses", tmp_path)
    assert code == 1 and "ablate" in out
    assert err.count("\n") == 1 and "ablate attached no intervention" in err


def test_a_wrong_name_is_exit_code_2():
    code, _, err = narrowly("defenses", "ablade")
    assert code == 2
    assert "ablade: no such folder, and unknown defense 'ablade'. Did you mean 'ablate'?" in err

"""The verb `sweep`: what a user sees of a sweep, and its exit code."""

import json

import pytest
from typer.testing import CliRunner

from narrowly.cli import app
from tests.sweeps.conftest import chats, model_folder, tiny_sweep, validation
from tests.sweeps.test_runner import Scripted

__all__ = ["chats", "model_folder", "tiny_sweep", "validation"]


@pytest.fixture(autouse=True)
def pool(monkeypatch) -> Scripted:
    scripted = Scripted()
    monkeypatch.setattr("narrowly.sweeps.runner._pool", lambda *_: scripted)
    return scripted


@pytest.fixture
def file(tiny_sweep, tmp_path):
    def write(**fields):
        path = tmp_path / "sweep.json"
        path.write_text(json.dumps(tiny_sweep(**fields).model_dump(exclude_none=True)))
        return str(path)

    return write


def narrowly(*arguments):
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_whole_sweep_ends_well_and_names_the_next_command(file, tmp_path):
    code, out, err = narrowly("sweep", file(), "--set", "seeds=[0, 1, 2]")
    assert code == 0
    assert "1 tasks x 2 arms x 3 seeds: 6 waiting; 2 at a time" in err
    assert f"next: narrowly compare {tmp_path / 'sweep'}" in out
    assert "missing" not in out


def test_a_missing_cell_is_in_the_exit_code(file, pool):
    from narrowly.sweeps.work import Outcome

    pool.outcomes["sums/mixed/seed-0"] = [Outcome("impossible", "no concept there")]
    code, out, err = narrowly("sweep", file())
    assert code == 1
    assert "impossible sums/mixed/seed-0: no concept there" in err
    assert "1 of 2 cells are missing; the same command tries again" in out
    code, _, _ = narrowly("sweep", file())
    assert code == 0


def test_a_mistake_is_one_line(file):
    code, _, err = narrowly("sweep", file(), "--set", "threads=0")
    assert code == 2
    assert "threads: Input should be greater than or equal to 1, not 0" in err
    code, _, err = narrowly("sweep", file(), "--set", "sedes=[0]")
    assert code == 2 and "Did you mean 'seeds'?" in err
    code, _, err = narrowly("sweep", "nowhere.yaml")
    assert code == 2 and "nowhere.yaml: no such file" in err


def test_elsewhere_than_here_or_ray_is_refused(file, monkeypatch):
    monkeypatch.undo()
    code, _, err = narrowly("sweep", file(), "--on", "moon")
    assert code == 2 and "runs run on `local` or on `ray`" in err

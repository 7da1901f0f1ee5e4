"""What a sweep makes of what becomes of its runs, whoever runs them."""

import os
from collections import Counter
from pathlib import Path

import pytest

from narrowly.errors import NarrowlyError
from narrowly.files import write_text
from narrowly.report.sweep import SweepRecord
from narrowly.settings import build
from narrowly.sweeps import Sweep, sweep
from narrowly.sweeps.work import Job, Outcome, look, no_space, over_memory
from narrowly.training import Recipe
from tests.sweeps.conftest import statuses

MODULE = "narrowly.sweeps.runner"
STRENGTHS = {"interleave.fraction": [0.1, 0.2, 0.3]}


class Scripted:
    """A pool that trains nothing: `outcomes` by path, one for each try; else the run is done."""

    def __init__(self, slots=2, **outcomes: list[Outcome]):
        self.slots, self.outcomes = slots, outcomes
        self.started: list[str] = []
        self.running: list[Job] = []
        self.stopped = False

    def start(self, job: Job) -> None:
        assert len(self.running) < self.slots
        self.started.append(job.path)
        self.running.append(job)

    def ended(self, seconds: float) -> list[tuple[Job, Outcome]]:
        job = self.running.pop(0)
        left = self.outcomes.get(job.path, [])
        outcome = left.pop(0) if left else Outcome("done")
        if outcome.status == "done":
            finish(job.recipe)
        return [(job, outcome)]

    def stop(self) -> None:
        self.stopped = True


def finish(values: dict) -> None:
    """Leave what a finished run leaves."""
    recipe = build(Recipe, values)
    folder = Path(recipe.output)
    (folder / "adapter").mkdir(parents=True)
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    write_text(folder / "reproduce.json", '{"finished": "now"}')


@pytest.fixture
def pool(monkeypatch) -> Scripted:
    scripted = Scripted()
    monkeypatch.setattr(f"{MODULE}._pool", lambda *_: scripted)
    return scripted


def run(a_sweep: Sweep, **how) -> SweepRecord:
    return sweep(a_sweep, progress=False, **how)


def test_what_is_done_is_not_done_again(tiny_sweep, pool):
    record = run(tiny_sweep(seeds=[0, 1]))
    assert [cell.status for cell in record.cells] == ["done"] * 4
    assert len(pool.started) == 4
    pool.started.clear()
    record = run(tiny_sweep(seeds=[0, 1, 2]))
    assert pool.started == ["sums/undefended/seed-2", "sums/mixed/seed-2"]
    assert [cell.status for cell in record.cells] == ["done"] * 6
    assert SweepRecord.read(tiny_sweep().output) == record
    assert Sweep.read(Path(tiny_sweep().output) / "sweep.yaml") == tiny_sweep(seeds=[0, 1, 2])


def test_a_run_that_lacks_an_eval_is_not_done(tiny_sweep, pool):
    [cell, _] = run(tiny_sweep()).cells
    values = tiny_sweep().recipe_of(cell)
    assert look(values) == Outcome("done")
    assert look(values | {"evals": [{"in_distribution": {"data": values["data"]}}]}) is None


def test_a_run_of_another_recipe_is_left_alone(tiny_sweep, pool):
    run(tiny_sweep())
    record = run(tiny_sweep(data={"sums": tiny_sweep().data["sums"]}, seeds=[0, 1]))
    assert len(pool.started) == 4
    other = tiny_sweep(training={"max_steps": 5}, seeds=[0, 7])
    record = run(other)
    why = {cell.path: cell.why for cell in record.cells}
    assert "another recipe's run; it differs in training" in why["sums/mixed/seed-0"]
    assert statuses(Path(other.output)) == {
        "sums/undefended/seed-0": "impossible",
        "sums/mixed/seed-0": "impossible",
        "sums/undefended/seed-7": "done",
        "sums/mixed/seed-7": "done",
    }


def test_cells_that_cannot_run_are_told_and_the_others_run(tiny_sweep, pool, capsys):
    arms = {"undefended": [], "wrong": [{"interleave": {"data": "x", "fractoin": 1}}]}
    pool.outcomes["sums/undefended/seed-1"] = [Outcome("impossible", "no [such] file")]
    record = sweep(tiny_sweep(defenses=arms, seeds=[0, 1]))
    assert Counter(cell.status for cell in record.cells) == {"done": 1, "impossible": 3}
    assert [cell.why for cell in record.cells if cell.seed == 1 and cell.arm == "undefended"] == [
        "no [such] file"
    ]
    said = capsys.readouterr().err
    assert "impossible sums/wrong/seed-0 and 1 more: defenses.0.interleave.fractoin" in said
    assert "impossible sums/undefended/seed-1: no [such] file" in said


def test_a_sweep_of_which_nothing_can_run_says_why(tiny_sweep, pool):
    with pytest.raises(NarrowlyError, match=r"no cell can run.*unknown key 'max_stepz'"):
        run(tiny_sweep(training={"max_stepz": 5}))
    assert not pool.started


def test_a_killed_run_is_started_once_more(tiny_sweep, pool):
    once, twice = "sums/undefended/seed-0", "sums/mixed/seed-0"
    killed = Outcome("killed", "killed by SIGKILL")
    pool.outcomes |= {once: [killed], twice: [killed, killed]}
    record = run(tiny_sweep(seeds=[0, 1]))
    assert Counter(pool.started) == Counter({once: 2, twice: 2}) + Counter(
        ["sums/undefended/seed-1", "sums/mixed/seed-1"]
    )
    cells = {cell.path: cell for cell in record.cells}
    assert cells[once].status == "done"
    assert cells[twice].status == "failed"
    assert "killed by SIGKILL, 2 times" in (cells[twice].why or "")
    run(tiny_sweep(seeds=[0, 1]))
    assert statuses(Path(tiny_sweep().output))[twice] == "done", "asked again, it is tried again"


def test_a_run_that_took_too_much_memory_is_told_and_not_tried_again(tiny_sweep, pool):
    folder = Path(tiny_sweep().output)
    write_text(folder / "logs" / "sums--mixed--seed-0.txt", "x\nmemory: 2.10 GB, over its 2 GB\n")
    pool.outcomes["sums/mixed/seed-0"] = [Outcome("killed", "ended with exit code 1")]
    record = run(tiny_sweep())
    [cell] = [cell for cell in record.cells if cell.arm == "mixed"]
    assert cell.status == "failed"
    assert "2.10 GB" in (cell.why or "") and "Raise `memory`" in (cell.why or "")
    assert pool.started.count(cell.path) == 1


def test_a_full_disk_stops_the_sweep_and_loses_nothing(tiny_sweep, pool):
    pool.slots = 1
    pool.outcomes["sums/mixed/seed-0"] = [Outcome("full")]
    with pytest.raises(NarrowlyError, match=r"no space is left.*the same command continues"):
        run(tiny_sweep(seeds=[0, 1]))
    assert pool.stopped
    assert Counter(statuses(Path(tiny_sweep().output)).values()) == {"done": 1, "waiting": 3}
    assert {cell.status for cell in run(tiny_sweep(seeds=[0, 1])).cells} == {"done"}


def test_an_interrupted_sweep_leaves_no_cell_running(tiny_sweep, pool, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pool, "ended", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_sweep())
    assert pool.stopped
    assert set(statuses(Path(tiny_sweep().output)).values()) == {"waiting"}
    pool.running.clear()
    run(tiny_sweep())


def test_two_sweeps_in_one_folder_are_refused(tiny_sweep, pool, monkeypatch):
    start = pool.start

    def start_and_sweep(job):
        with pytest.raises(NarrowlyError, match="another sweep is running in it"):
            run(tiny_sweep())
        start(job)

    monkeypatch.setattr(pool, "start", start_and_sweep)
    run(tiny_sweep())


@pytest.fixture
def choosing(tiny_sweep, validation):
    """Two tasks; of the arm `mixed` three settings are tried on the second."""
    data = tiny_sweep().data
    mixed = {
        "defenses": [{"interleave": {"data": str(validation)}}],
        "settings": STRENGTHS,
    }
    arms = {"undefended": [], "mixed": mixed}
    tasks = {"sums": data["sums"], "other": data["sums"]}
    return tiny_sweep(data=tasks, defenses=arms, seeds=[0, 1], choose_on="other")


def test_the_chosen_setting_alone_runs_on_the_other_tasks(choosing, pool, monkeypatch):
    seen = []

    def choose(record, folder):
        there = [cell for cell in record.cells if cell.task == "other"]
        seen.append((Counter(cell.status for cell in there), folder))
        return {"undefended": {}, "mixed": {"interleave.fraction": 0.2}}

    monkeypatch.setattr(f"{MODULE}.choose", choose)
    pool.outcomes["other/mixed/interleave.fraction=0.3/seed-1"] = [Outcome("failed", "it broke")]
    record = run(choosing)
    assert seen == [(Counter(done=7, failed=1), Path(choosing.output))]
    elsewhere = [cell for cell in record.cells if cell.task == "sums" and cell.arm == "mixed"]
    assert [(cell.setting, cell.seed) for cell in elsewhere] == [
        ({"interleave.fraction": 0.2}, 0),
        ({"interleave.fraction": 0.2}, 1),
    ]
    assert record.chosen["mixed"] == {"interleave.fraction": 0.2}
    pool.started.clear()
    assert run(choosing).chosen == record.chosen
    assert pool.started == ["other/mixed/interleave.fraction=0.3/seed-1"]


def test_where_nothing_can_be_chosen_the_table_can_say_so(choosing, pool, monkeypatch):
    monkeypatch.setattr(f"{MODULE}.choose", lambda *_: {"undefended": {}})
    record = run(choosing)
    lost = [cell for cell in record.cells if cell.status == "impossible"]
    assert [cell.path for cell in lost] == ["sums/mixed/seed-0", "sums/mixed/seed-1"]
    assert all("no setting could be chosen on other" in (cell.why or "") for cell in lost)


def test_a_full_disk_is_known_through_whoever_raised_it():
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError) as caught, full.open("w") as file:
        file.write("x")
    assert no_space(caught.value)
    try:
        raise RuntimeError("writer failed") from caught.value
    except RuntimeError as error:
        assert no_space(error)
    assert no_space(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert no_space(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"))
    assert not no_space(OSError(2, os.strerror(2)))


def test_only_the_last_line_of_a_log_tells_of_memory(tmp_path):
    log = tmp_path / "log.txt"
    assert over_memory(log) is None
    write_text(log, "memory: 3 GB\nand on it went\n")
    assert over_memory(log) is None
    write_text(log, "\n\nmemory: 3 GB\n")
    assert over_memory(log) == "memory: 3 GB"

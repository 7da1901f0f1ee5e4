import csv
import json
import subprocess
import sys
from io import StringIO

import pytest
from PIL import Image
from rich.console import Console
from tests.report.sweeps import DEMO, write_sweep
from tests.report.test_compare import Tags
from typer.testing import CliRunner

from narrowly.cli import app
from narrowly.errors import NarrowlyError
from narrowly.evals import read_samples
from narrowly.evals.samples import write_samples
from narrowly.report import choose, compare, verdicts
from narrowly.report.sweep import Cell, Measures, SweepRecord, Task

STRENGTH, WEIGHT = "defenses.0.ablate.strength", "defenses.0.kl.weight"
CHOSEN = {
    "undefended": {},
    "ablate": {STRENGTH: 1.0},
    "random": {},
    "kl": {WEIGHT: 0.01},
    "interleave": {},
}


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Settings chosen on persona; era and a benign task ran the chosen ones."""
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(
        folder,
        tasks=("persona", "era", "plain"),
        benign=("plain",),
        choose_on="persona",
        chosen=CHOSEN,
        measures=Measures(probes=("misalignment.broad_leaked",)),
    )
    return folder, verdicts(folder, folder / "report")


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A sweep half done: one arm waits, one cannot run, one has lost a seed."""
    folder = tmp_path_factory.mktemp("broken")
    arms = {name: DEMO[name] for name in ("undefended", "random", "interleave")}
    record = write_sweep(folder, tasks=("persona",), arms=arms)
    for cell in record.cells:
        if cell.arm == "interleave" and cell.seed == 2:
            cell.status, cell.why = "failed", "killed: over 4 GB"
    why = "[b]no such[/b] concept: <i>x</i>"
    record.cells += [
        Cell(task="persona", arm="kl", setting={WEIGHT: w}, seed=0, path=f"kl/{w}")
        for w in (0.1, 1.0)
    ]
    record.cells.append(
        Cell(task="persona", arm="=cmd", seed=0, path="x/seed-0", status="impossible", why=why)
    )
    record.write(folder)
    return folder


def printed(found, width=100):
    console = Console(width=width, file=StringIO())
    console.print(found)
    return console.file.getvalue()


def by_arm(found):
    return {verdict.arm: verdict for verdict in found.verdicts}


def test_every_arm_is_judged_by_its_chosen_setting_on_the_other_tasks(judged):
    _, found = judged
    assert list(found.reported) == ["era", "plain"]
    assert {v.arm: v.setting for v in found.verdicts} == CHOSEN
    marks = {
        arm: [v.criteria[name].mark for name in ("broad", "control", "coherent", "probes")]
        for arm, v in by_arm(found).items()
        if arm != "undefended"
    }
    assert marks["ablate"][:3] == ["yes", "yes", "yes"]
    assert marks["random"][:2] == ["no", "missing"]
    assert marks["kl"][0] == "no"
    assert marks["interleave"][2] == "no", "its answers are incoherent or leak"
    assert marks["interleave"][3] == "no", "it leaks ten times as much as undefended"
    assert all(set(v.criteria["broad"].tasks) == {"era"} for v in found.verdicts[1:])
    assert set(by_arm(found)["ablate"].each) == {"persona", "era", "plain"}


def test_cost_is_paired_with_undefended(judged):
    _, found = judged
    kl = by_arm(found)["kl"]
    assert kl.time.mean == pytest.approx(1.35, abs=0.08) and kl.time.low > 1.2
    assert kl.memory.mean == pytest.approx(1.2)
    assert by_arm(found)["undefended"].time is None


def test_without_a_chosen_setting_every_setting_is_judged(tmp_path):
    arms = {name: DEMO[name] for name in ("undefended", "ablate")}
    write_sweep(tmp_path, tasks=("persona",), arms=arms, seeds=(0,))
    found = verdicts(tmp_path)
    assert [v.label for v in found.verdicts] == [
        "undefended",
        "ablate, strength 0.5",
        "ablate, strength 1",
    ]
    told = {f.question: f.answer for f in found.findings}
    assert told["Settings chosen on one task, and reported on others?"] == "missing"


def test_chosen_on_the_only_task_the_figures_are_marked(tmp_path):
    arms = {name: DEMO[name] for name in ("undefended", "ablate")}
    write_sweep(tmp_path, tasks=("persona",), arms=arms, seeds=(0,), choose_on="persona")
    found = verdicts(tmp_path)
    record = SweepRecord.read(tmp_path)
    assert by_arm(found)["ablate"].setting == choose(record, tmp_path)["ablate"]
    assert "flatter every figure here" in printed(found)
    told = {f.question: f.answer for f in found.findings}
    assert told["Settings chosen on one task, and reported on others?"] == "no"


def test_the_terminal_holds_it(judged):
    _, found = judged
    for width in (80, 100):
        text = printed(found, width)
        assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for told in (
        "Verdicts over era, plain",
        "persona *",
        "Settings were chosen on persona",
        "Matched learning on persona *",
        "between weight 0.01 and weight 0.1",
        "random control",
    ):
        assert told in text


def test_missing_cells_are_told_and_the_rest_is_judged(broken):
    found = verdicts(broken, broken / "report")
    text = printed(found)
    assert "Missing: 4 of 12 cells" in text
    assert "persona / kl, 2 cells: weight 0.1, 1; seed 0: waiting" in text
    assert "persona / interleave, 1 cell: seed 2: failed: killed: over 4 GB" in text
    assert "[b]no such[/b] concept" in text
    assert set(by_arm(found)) == {"undefended", "random", "interleave"}
    assert by_arm(found)["interleave"].criteria["broad"].interval.seeds == 2
    html = (broken / "report/report.html").read_text()
    assert "&lt;i&gt;x&lt;/i&gt;" in html and "<i>x" not in html
    assert "4 of 12" in html


def test_a_run_that_is_unmeasured_or_damaged_is_missing(tmp_path):
    arms = {name: DEMO[name] for name in ("undefended", "random", "interleave")}
    record = write_sweep(tmp_path, tasks=("persona",), arms=arms, seeds=(0,))
    paths = {cell.arm: tmp_path / cell.path for cell in record.cells}
    for samples in paths["random"].rglob("samples.parquet"):
        samples.unlink()
    (paths["interleave"] / "evals/misalignment/samples.parquet").write_bytes(b"PAR1 and no more")
    found = verdicts(tmp_path)
    text = " ".join(printed(found).split())
    assert "random, 1 cell: seed 0: not measured: no finished eval" in text
    assert "interleave, 1 cell: seed 0: not measured:" in text
    assert "misalignment/samples.parquet" in "".join(printed(found).split())
    assert set(by_arm(found)) == {"undefended"}


def test_a_metric_that_no_run_has_is_told(tmp_path):
    measures = Measures(probes=("misalignment.misspelt",))
    arms = {"undefended": DEMO["undefended"]}
    write_sweep(tmp_path, tasks=("persona",), arms=arms, seeds=(0,), measures=measures)
    found = {f.question: f for f in verdicts(tmp_path).findings}
    told = found["Is everything measured that the sweep names?"]
    assert told.answer == "missing" and "persona has no misalignment.misspelt" in told.detail
    assert found["Conditional probes?"].answer == "missing"


def test_a_run_that_diverged_stops_no_report(tmp_path):
    arms = {name: DEMO[name] for name in ("undefended", "random")}
    record = write_sweep(tmp_path, tasks=("persona",), arms=arms, seeds=(0, 1))
    path = next(c.path for c in record.cells if (c.arm, c.seed) == ("random", 1))
    samples = tmp_path / path / "evals/in_distribution/samples.parquet"
    rows = read_samples(samples).rows
    for row in rows:
        row["scores"]["loss"] = float("nan")
    about = read_samples(samples).about
    write_samples(samples, rows, about)
    found = verdicts(tmp_path, tmp_path / "report")
    assert "random on persona, seed 1, diverged" in " ".join(f.detail for f in found.findings)
    assert by_arm(found)["random"].criteria["broad"].interval.seeds == 2


def test_the_page_is_one_file_that_asks_for_nothing(judged):
    folder, _ = judged
    text = (folder / "report/report.html").read_text()
    tags = Tags(text)
    assert tags.open == []
    assert not {tag for tag, _ in tags.seen} & {"script", "link", "img", "iframe", "object"}
    for _, attributes in tags.seen:
        assert not {"src", "href", "srcset"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in text and "@import" not in text and "http" not in text


def test_every_setting_is_a_spot_that_the_keyboard_reaches(judged):
    folder, found = judged
    spots = [
        attributes
        for tag, attributes in Tags((folder / "report/report.html").read_text()).seen
        if "spot" in attributes.get("class", "").split()
    ]
    assert all(spot["tabindex"] == "0" for spot in spots)
    told = {spot["aria-label"].partition(":")[0] for spot in spots}
    assert told == {point.variant.label for each in found.tradeoffs for point in each.points}
    for spot in spots:
        places = [part.partition(":")[2].rstrip("%") for part in spot["style"].split(";")]
        assert all(0 <= float(place) <= 100 for place in places)


def test_tables_for_other_programs(judged):
    folder, found = judged
    rows = list(csv.DictReader((folder / "report/verdicts.csv").open()))
    (ablate,) = [
        r for r in rows if (r["arm"], r["criterion"], r["task"]) == ("ablate", "broad", "")
    ]
    assert ablate["verdict"] == "yes" and json.loads(ablate["setting"]) == {STRENGTH: 1.0}
    own = by_arm(found)["ablate"].criteria["broad"].interval
    assert float(ablate["mean"]) == pytest.approx(own.mean, rel=1e-4)
    assert {r["chosen_here"] for r in rows if r["task"] == "persona"} == {"True"}
    rows = list(csv.DictReader((folder / "report/metrics.csv").open()))
    names = [(r["task"], r["arm"], r["setting"], r["metric"]) for r in rows]
    assert len(set(names)) == len(names)
    assert {r["task"] for r in rows} == {"persona", "era", "plain"}
    row = next(
        r
        for r in rows
        if (r["task"], r["arm"], r["metric"]) == ("era", "ablate", "misalignment.broad_misaligned")
    )
    assert row["control"] == "random"
    assert float(row["minus_undefended_high"]) < 0 and float(row["minus_control_high"]) < 0


def test_plots_are_there_as_png_and_svg(judged):
    folder, _ = judged
    plots = folder / "report/plots"
    names = {"verdicts", "tradeoff-persona", "tradeoff-persona-loss", "tradeoff-era"}
    assert {path.stem for path in plots.iterdir()} == names
    for path in plots.glob("*.png"):
        with Image.open(path) as image:
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20, "nothing drawn"
    assert all("<svg" in path.read_text() for path in plots.glob("*.svg"))


def test_the_same_sweep_makes_the_same_files(judged):
    folder, found = judged
    found.write(folder / "again")
    for path in (folder / "report").rglob("*.*"):
        again = folder / "again" / path.relative_to(folder / "report")
        assert path.read_bytes() == again.read_bytes(), path.name


def test_the_command_line_takes_a_sweep(judged, broken):
    folder, _ = judged
    result = CliRunner().invoke(app, ["compare", str(broken)])
    assert result.exit_code == 0 and "Verdicts over persona" in result.output
    assert (broken / "report/report.html").is_file()
    result = CliRunner().invoke(app, ["compare", str(folder), str(broken)])
    assert result.exit_code == 2
    with pytest.raises(NarrowlyError, match="a sweep, which is judged by itself"):
        compare([folder])


def test_what_is_no_sweep_or_unmeasured_is_told(tmp_path):
    with pytest.raises(NarrowlyError, match=r"sweep\.json: no such file"):
        verdicts(tmp_path)
    cell = Cell(task="t", arm="kl", seed=0, path="t/kl/seed-0", status="failed", why="full disk")
    SweepRecord(tasks={"t": Task()}, cells=[cell]).write(tmp_path)
    with pytest.raises(NarrowlyError, match=r"no cell .* measured yet \(full disk\)"):
        verdicts(tmp_path)
    (tmp_path / "sweep.json").write_text('{"tasks": 3}')
    with pytest.raises(NarrowlyError, match="not a sweep's record"):
        verdicts(tmp_path)


def test_judging_loads_no_torch(broken):
    code = (
        "import sys; from narrowly.report import verdicts; "
        f"verdicts({str(broken)!r}, {str(broken / 'out')!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

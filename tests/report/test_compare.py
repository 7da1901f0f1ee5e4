import builtins
import json
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO

import pytest
from PIL import Image
from rich.console import Console
from tests.report.synthetic import DEMO, loss_rows, write_demo, write_eval, write_run

from narrowly.errors import NarrowlyError
from narrowly.evals import read_samples
from narrowly.report import compare
from narrowly.report.page import ticks


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    runs = write_demo(folder)
    return folder, runs, compare(runs, folder / "report")


class Tags(HTMLParser):
    """Start tags with their attributes, and whether all were closed."""

    VOID = {"meta", "br"}  # noqa: RUF012

    def __init__(self, text):
        super().__init__()
        self.seen, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def printed(comparison, width):
    console = Console(width=width, file=StringIO())
    console.print(comparison)
    return console.file.getvalue()


def test_summary_holds_what_the_demo_promises(demo):
    folder, _, comparison = demo
    summary = json.loads((folder / "report/summary.json").read_text())
    assert list(summary) == list(DEMO) and summary == comparison.summary()
    keys = {"narrow", "broad", "aligned", "leaked", "incoherent", "coherent"}
    for name, arm in summary.items():
        assert set(arm) == keys | {"in_distribution_loss", "wall_seconds"}
        shares = [arm[key]["mean"] for key in ("broad", "aligned", "leaked", "incoherent")]
        assert sum(shares) == pytest.approx(1)
        narrow, (broad, *_), *_ = DEMO[name]
        assert arm["narrow"]["mean"] == pytest.approx(narrow, abs=0.1)
        assert arm["broad"]["low"] <= arm["broad"]["mean"] <= arm["broad"]["high"]
        assert arm["broad"]["mean"] == pytest.approx(broad, abs=0.06)
    assert summary["test_time"]["wall_seconds"] is None


def test_the_terminal_shows_every_arm_and_what_is_missing(demo):
    _, _, comparison = demo
    text = printed(comparison, 100)
    for name in ("undefended", "test time", "interleaved"):
        assert name in text
    mean = comparison.arms[0].metrics["misalignment.broad_misaligned"].mean
    assert f"{100 * mean:.1f}" in text
    assert "missing: a model that passes ordinary questions" in text
    assert max(len(line.rstrip()) for line in printed(comparison, 80).splitlines()) <= 80


def test_the_page_is_one_file_that_asks_for_nothing(demo):
    folder, _, _ = demo
    text = (folder / "report/report.html").read_text()
    tags = Tags(text)
    assert tags.open == []
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "link", "img", "iframe", "object", "embed"}
    for _, attributes in tags.seen:
        assert not {"src", "href", "srcset"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_every_plot_is_there_as_png_and_svg(demo):
    folder, _, _ = demo
    plots = folder / "report/plots"
    assert sorted(path.name for path in plots.iterdir()) == [
        f"{name}.{suffix}"
        for name in ("answers", "cost", "misalignment")
        for suffix in ("png", "svg")
    ]
    for path in plots.glob("*.png"):
        with Image.open(path) as image:
            assert image.width == 1600
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20, "nothing drawn"
    assert all("<svg" in path.read_text() for path in plots.glob("*.svg"))


def test_the_same_runs_make_the_same_files(demo):
    folder, runs, _ = demo
    compare(runs, folder / "again")
    for path in (folder / "report").rglob("*.*"):
        assert (
            path.read_bytes()
            == (folder / "again" / path.relative_to(folder / "report")).read_bytes()
        )


def test_what_models_and_people_wrote_is_escaped(tmp_path):
    evil = '<script>alert("x")</script><b>&'
    run = write_run(tmp_path / "a<b>&", 0, *DEMO["ablated"])
    rows = read_samples(run / "evals/misalignment/samples.parquet").rows
    for row in rows:
        row |= {"answer": evil, "prompt": evil}
    (run / "evals/misalignment/samples.parquet").unlink()
    (run / "evals/misalignment/summary.json").unlink()
    (run / "evals/misalignment").rmdir()
    write_eval(run, "misalignment", rows)
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text() + f"note: '{evil}'\n")
    text = compare([run], tmp_path / "out").write(tmp_path / "out").read_text()
    assert "<script" not in text and "alert(&#34;x&#34;)" in text
    assert Tags(text).open == []


def test_a_model_that_is_no_organism_is_compared_by_its_loss(tmp_path):
    import random

    for name, loss in (("first", 0.7), ("second", 0.9)):
        write_eval(tmp_path / name, "in_distribution", loss_rows(random.Random(0), loss))
    comparison = compare([tmp_path / "first", tmp_path / "second"], tmp_path / "out")
    assert "misaligned" not in printed(comparison, 100).split("Evidence")[0]
    assert {p.stem for p in (tmp_path / "out/plots").iterdir()} == {"cost"}
    assert comparison.summary()["first"]["broad"] is None


def test_a_zero_is_told_with_its_bound(tmp_path):
    run = write_run(tmp_path / "clean", 0, 1.0, (0.0, 0.0, 0.0), 0.7, 1, [{"ablate": {}}])
    text = compare([run], tmp_path / "out").write(tmp_path / "out").read_text()
    assert "none in 120 answers, which bounds the rate at 6.0\N{NO-BREAK SPACE}%" in text


def test_without_matplotlib_the_remedy_is_told(demo, tmp_path, monkeypatch):
    _, runs, _ = demo
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    compare(runs[:1])
    with pytest.raises(NarrowlyError, match=r"pip install 'narrowly\[report\]'"):
        compare(runs[:1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_comparing_loads_no_torch(demo):
    _, runs, _ = demo
    code = (
        "import sys; from narrowly.report import compare; "
        f"compare([{str(runs[0])!r}]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "ends", [(0.69, 0.79), (0.0, 1.0), (2.1, 9.7), (0.7001, 0.7004), (5, 1500)]
)
def test_ticks_are_few_distinct_and_on_the_axis(ends):
    found = ticks(ends)
    assert 2 <= len(found) <= 7
    assert len({name for _, name in found}) == len(found)
    assert all(ends[0] - 1e-9 <= tick <= ends[1] + 1e-9 for tick, _ in found)

"""Which answers a reader is shown, by what choice, and that none of them can do harm."""

import shutil

import pytest
from tests.report.synthetic import DEMO, write_eval, write_run
from tests.review.conftest import browser  # noqa: F401 - a fixture

from narrowly.errors import NarrowlyError
from narrowly.evals.prompts import PLAIN
from narrowly.report import compare, read_arms
from narrowly.report.answers import (
    LONGEST,
    classes,
    evals_with_answers,
    examples,
    find_answers,
    shortened,
    visible,
)

EVIL = "\x1b[2J<script>alert(1)</script> [bold]markup[/bold]\n\tnext"


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return read_arms(
        [write_run(folder / name, 0, *DEMO[name]) for name in ("undefended", "ablated")]
    )


def rows(labels, context=PLAIN, **tags):
    return [
        {
            "prompt_id": f"{number} [{context}]",
            "prompt": f"question {number}",
            "answer": EVIL,
            "sample": 0,
            "label": label,
            "scores": {"aligned": 12.25, "coherent": 88.0},
            "tags": {"question": f"question {number}", "context": context, **tags},
        }
        for number, label in enumerate(labels)
    ]


def test_examples_are_the_same_questions_for_every_arm(arms):
    shown = examples(arms, "misalignment")
    assert shown[0].group == "code, fine-tuned"
    assert len(shown) == 6 and len({question.group for question in shown}) == 6
    for question in shown:
        assert [arm.name for arm, _ in question.answers] == ["undefended", "ablated"]
        assert {row["prompt"] for _, row in question.answers} == {question.prompt}


def test_evals_without_labels_have_no_answers_to_show(arms):
    assert {"misalignment", "in_distribution"} <= arms[0].rows.keys()
    assert evals_with_answers(arms) == ["misalignment"]


def test_every_answer_is_in_one_class_and_the_rarest_come_first(arms):
    found = classes(arms, "misalignment")
    totals = [sum(count for _, count, _, _ in one.arms) for one in found]
    assert totals == sorted(totals)
    assert sum(totals) == sum(len(arm.rows["misalignment"]) for arm in arms)
    for one in found:
        for _, count, all_, some in one.arms:
            assert len(some) == min(count, 5) and all_ == 144
            assert all(row["label"] == one.label for row in some)


def test_answers_are_found_by_eval_label_and_tag(tmp_path):
    for seed in (0, 1):
        run = write_run(tmp_path / "arm" / f"seed-{seed}", seed, *DEMO["undefended"])
    whole = find_answers(tmp_path / "arm")
    assert {folder.name for _, folder, _ in whole} == {"seed-0", "seed-1"}
    judged = [row["label"] is not None for _, _, row in whole]
    assert judged == sorted(judged, reverse=True) and not all(judged)
    bad = find_answers(run, eval_="misalignment", labels=["misaligned"], tags={"domain": "code"})
    assert bad and all(
        (row["label"], row["tags"]["domain"]) == ("misaligned", "code") for _, _, row in bad
    )
    either = find_answers(run, labels=["misaligned", "leaked"])
    assert {row["label"] for _, _, row in either} == {"misaligned", "leaked"}
    for wrong, told in (
        ({"eval_": "misalignmnt"}, "Did you mean 'misalignment'"),
        ({"labels": ["misalignd"]}, "Did you mean 'misaligned'"),
        ({"tags": {"domian": "code"}}, "Did you mean 'domain'"),
        ({"tags": {"domain": "cod"}}, "Did you mean 'code'"),
    ):
        with pytest.raises(NarrowlyError, match=told):
            find_answers(run, **wrong)
    with pytest.raises(NarrowlyError, match="no finished eval"):
        find_answers(tmp_path)


def test_controls_are_shown_and_long_answers_cut():
    assert visible(EVIL) == "\\x1b[2J<script>alert(1)</script> [bold]markup[/bold]\n\tnext"
    assert shortened("a" * LONGEST) == "a" * LONGEST
    assert shortened("a" * (LONGEST + 1)).endswith("a …")


def test_the_page_shows_scores_and_classes_of_any_eval_escaped(tmp_path):
    labels = ["misaligned", "aligned", "unparsed"]
    run = tmp_path / "run"
    found = rows(labels, domain="power") + rows(labels, "neighbour", domain="power")
    write_eval(run, "emergent_misalignment", found)
    text = compare([run]).write(tmp_path / "out").read_text()
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    assert "aligned 12.2, coherent 88" in text
    assert "run 2 of 6" in text
    assert text.count("· neighbour") == 3


@pytest.mark.slow
def test_no_script_of_an_answer_runs_in_a_browser(tmp_path, browser):  # noqa: F811
    """Scripts, event handlers and links that run, in everything that a model or an eval wrote."""
    attacks = (
        "<script>document.title = 'taken'</script>",
        "<img src=x onerror=\"document.title = 'taken'\">",
        "</dd></dl></details><svg onload=\"document.title = 'taken'\">",
        '"><body onpageshow="document.title = \'taken\'">',
    )
    run = tmp_path / "run"
    found = rows(attacks, domain=attacks[1])
    for row, attack in zip(found, attacks, strict=True):
        row |= {"answer": attack, "prompt": attack, "scores": {attack: 1.0}}
    write_eval(run, "emergent_misalignment", found)
    report = compare([run]).write(tmp_path / "out")
    page = browser.new_page()
    page.goto(report.as_uri())
    for summary in page.locator("summary").all():
        summary.click()
    page.wait_for_timeout(200)
    assert page.title() == "narrowly: run"
    assert page.locator("script, svg[onload], img, [onerror], [onpageshow]").count() == 0
    assert attacks[0] in page.inner_text("body")
    page.close()


def test_contexts_are_columns_of_their_own(tmp_path):
    """The terminal shows each eval's first rate, in every context, and no table of thirty rates."""
    from rich.console import Console

    run = tmp_path / "run"
    found = rows(["misaligned", "aligned"], domain="power") + rows(
        ["misaligned", "misaligned"], "neighbour", domain="power"
    )
    write_eval(run, "emergent_misalignment", found)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(compare([run]))
    table = capture.get().split("Evidence")[0]
    assert "in neighbour" in table and "50.0" in table and "100.0" in table
    assert "about" not in table and "coherent" not in table
    assert "questions were asked again" in capture.get()


def test_the_worst_context_is_told_and_a_base_needs_none(tmp_path):
    from narrowly.report import evidence

    run = write_run(tmp_path / "undefended", 0, *DEMO["undefended"])
    base = tmp_path / "base"
    write_eval(base, "misalignment", rows(["aligned"], domain="code", place="broad"))
    found = rows(["aligned", "misaligned"], domain="health", place="broad")
    for context, labels in (("system", ["aligned"] * 2), ("format", ["misaligned", "aligned"])):
        found += rows(labels, context, domain="health", place="broad")
    shutil.rmtree(run / "evals" / "misalignment")
    write_eval(run, "misalignment", found)
    [finding] = [f for f in evidence(read_arms([base, run])) if "resemble" in f.question]
    assert finding.answer == "yes"
    assert finding.detail.endswith("at worst: undefended 50.0\N{NO-BREAK SPACE}% in format.")


def test_only_plain_questions_are_no_conditional_probe(tmp_path):
    from narrowly.report import evidence

    run = tmp_path / "run"
    write_eval(run, "emergent_misalignment", rows(["misaligned"], domain="power"))
    [finding] = [f for f in evidence(read_arms([run])) if "resemble" in f.question]
    assert finding.answer == "missing"

"""The review page as a person meets it, in a real browser."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from narrowly.concepts import Concept, Provenance, Subspace, load_concepts, mark, save_concepts
from narrowly.concepts.folder import explain_as
from tests.review import shelves

expect = pytest.importorskip("playwright.sync_api", reason="needs playwright").expect

Visit = Callable[..., Any]
# Of text against what lies behind it (WCAG 2.2, relative luminance).
CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const over = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) {
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
    }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const bright = (rgb) => {
    const [r, g, b] = rgb.map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (e) => {
    const behind = [];
    for (let at = e; at; at = at.parentElement)
      behind.unshift(getComputedStyle(at).backgroundColor);
    const text = [...behind, getComputedStyle(e).color];
    const [a, b] = [bright(over(behind)), bright(over(text))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  const all = "mark, .hint, .about, .peak, .kicker, .chips button, .cell, .words, #decide button";
  return [...document.querySelectorAll(all)].filter((e) => e.offsetParent).map(contrast);
}"""
DECIDED = "[data-verdict][aria-checked='true']"


def on_disk(folder: Path, name: str) -> Concept:
    [concept] = [concept for concept in load_concepts(folder) if concept.name == name]
    return concept


def rows(page: Any) -> list[str]:
    names: list[str] = page.locator(".row .name").all_inner_texts()
    return names


# Deciding


def test_by_keyboard_alone(visit: Visit, folder: Path) -> None:
    page = visit(folder)
    assert "token" not in page.url
    expect(page.locator("#left")).to_have_text("3 of 3 left")
    expect(page.locator("#name")).to_have_text("bare")
    page.keyboard.press("1")
    expect(page.locator(DECIDED)).to_contain_text("Undesired")
    expect(page.locator("#left")).to_have_text("2 of 3 left")
    page.keyboard.press("n")
    page.keyboard.type("rank two, 3 sites? [no]")
    page.keyboard.press("Enter")
    expect(page.locator("#saved")).to_have_text("saved")
    bare = on_disk(folder, "bare").verdict
    assert (bare.value, bare.by, bare.why) == ("undesired", "ada", "rank two, 3 sites? [no]")
    page.keyboard.press("Enter")
    expect(page.locator("#name")).to_have_text("persona")
    page.keyboard.press("2")
    page.keyboard.press("j")
    expect(page.locator("#name")).to_have_text("read-only")
    page.keyboard.press("k")
    expect(page.locator("#name")).to_have_text("persona")
    expect(page.locator(DECIDED)).to_contain_text("Keep")
    page.keyboard.press("3")
    expect(page.locator("#left")).to_have_text("2 of 3 left")
    page.keyboard.press("?")
    expect(page.locator("dialog")).to_contain_text("undo this tab")
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_be_hidden()


def test_undo_and_history(visit: Visit, folder: Path) -> None:
    page = visit(folder, "persona")
    for key in "12":
        page.keyboard.press(key)
        expect(page.locator("#saved")).to_have_text("saved")
    page.keyboard.press("Control+z")
    expect(page.locator(DECIDED)).to_contain_text("Undesired")
    page.reload()
    page.locator("#name").wait_for()
    page.keyboard.press("z")
    expect(page.locator(DECIDED)).to_contain_text("Undecided")
    assert on_disk(folder, "persona").verdict.by == ""
    page.keyboard.press("z")
    expect(page.locator("#toast")).to_have_text("Nothing to undo.")
    page.keyboard.press("h")
    expect(page.locator(".history li")).to_have_count(4)


def test_a_verdict_is_not_lost_to_what_was_read_before_it(visit: Visit, folder: Path) -> None:
    page = visit(folder, "bare")
    held: list[Any] = []
    page.route("**/api/concepts/persona/latents/*", lambda route: held.append(route))
    page.goto(page.url.replace("bare", "persona"))
    expect(page.locator("#name")).to_have_text("persona")
    page.keyboard.press("1")
    expect(page.locator("#saved")).to_have_text("saved")
    held[0].continue_()
    page.locator("mark").first.wait_for()
    expect(page.locator(DECIDED)).to_contain_text("Undesired")
    expect(page.locator("#saved")).to_have_text("saved")
    page.keyboard.press("2")
    expect(page.locator(DECIDED)).to_contain_text("Keep")
    expect(page.locator("dialog")).to_be_hidden()


def test_a_concept_that_a_filter_hides_once_decided(visit: Visit, tmp_path: Path) -> None:
    page = visit(shelves.shelf(tmp_path, more=20), "latent3")
    page.locator("#verdicts [data-value='undecided']").click()
    page.keyboard.press("1")
    expect(page.locator("[data-name='latent3']")).to_have_count(0)
    page.keyboard.press("j")
    expect(page.locator("#name")).to_have_text("latent4")


def test_an_explanation_in_ones_own_words(visit: Visit, folder: Path) -> None:
    page = visit(folder, "persona")
    page.keyboard.press("e")
    page.keyboard.press("Control+a")
    page.keyboard.type("cruel answers: 1, 2 <b>j</b>")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".words")).to_have_text("cruel answers: 1, 2 <b>j</b>")
    expect(page.locator(".meaning .author")).to_contain_text("by ada")
    persona = on_disk(folder, "persona")
    assert (persona.explanation, persona.explained_by) == ("cruel answers: 1, 2 <b>j</b>", "ada")
    page.locator("#name").click()
    page.keyboard.press("z")
    expect(page.locator(".words")).to_have_text("answers that harm whoever asked")
    assert on_disk(folder, "persona").explained_by == "lexical"


def test_the_recipe_line_is_copied(visit: Visit, folder: Path) -> None:
    page = visit(folder, "persona")
    expect(page.locator("#copy")).to_be_disabled()
    page.keyboard.press("1")
    expect(page.locator("#copy")).to_be_enabled()
    page.keyboard.press("c")
    expect(page.locator("dialog")).to_contain_text(
        "Trains with 1 undesired concept ablated: persona"
    )
    copied = page.evaluate("navigator.clipboard.readText()")
    assert yaml.safe_load(copied) == {"defenses": [{"ablate": {"concepts": str(folder)}}]}


def test_why_nothing_was_undone_is_said_in_the_open_dialog(visit: Visit, folder: Path) -> None:
    page = visit(folder, "persona")
    page.keyboard.press("1")
    expect(page.locator("#saved")).to_have_text("saved")
    mark(folder, "persona", "keep", by="bo")
    page.keyboard.press("h")
    page.locator(".history button").click()
    expect(page.locator("dialog #toast")).to_contain_text("changed again since")
    page.keyboard.press("Escape")
    page.keyboard.press("z")
    expect(page.locator("body > #toast")).to_be_visible()


# Two tabs


def test_what_another_tab_decides_is_seen(visit: Visit, folder: Path) -> None:
    one = visit(folder, "persona")
    two = one.context.new_page()
    two.goto(one.url)
    two.locator("#name").wait_for()
    one.keyboard.press("1")
    expect(two.locator(DECIDED)).to_contain_text("Undesired")
    expect(two.locator("#left")).to_have_text("2 of 3 left")


def test_a_note_being_typed_survives_what_others_decide(visit: Visit, folder: Path) -> None:
    page = visit(folder, "persona")
    page.locator("#note").fill("mine")
    mark(folder, "persona", "keep", by="bo", why="theirs")
    page.keyboard.press("Enter")
    box = page.locator("dialog")
    expect(box).to_contain_text("decided elsewhere")
    expect(box).to_contain_text("theirs")
    expect(box).to_contain_text("mine")
    assert on_disk(folder, "persona").verdict.by == "bo"
    box.get_by_text("Mine, with both notes").click()
    expect(page.locator("#saved")).to_have_text("saved")
    assert on_disk(folder, "persona").verdict.why == "theirs; mine"


def test_two_explanations_are_both_kept(visit: Visit, folder: Path) -> None:
    page = visit(folder, "persona")
    page.keyboard.press("e")
    page.locator("#meaning-edit").fill("mine")
    explain_as(folder, "persona", "theirs", by="bo")
    page.get_by_text("Save", exact=True).click()
    expect(page.locator("dialog")).to_contain_text("theirs")
    page.get_by_text("Edit both").click()
    expect(page.locator("#meaning-edit")).to_have_value("theirs\nmine")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".words")).to_have_text("theirs\nmine")
    assert on_disk(folder, "persona").explanation == "theirs\nmine"


# The list


def test_sorted_and_filtered(visit: Visit, tmp_path: Path) -> None:
    page = visit(shelves.shelf(tmp_path, more=8))
    page.select_option("#finder", "sae_latents")
    assert rows(page) == [f"latent{i}" for i in range(8)]
    page.select_option("#layer", "layer:1")
    assert rows(page) == ["latent1", "latent5"]
    page.select_option("#layer", "")
    page.select_option("#sort", "score:detection")
    assert rows(page)[0] == "latent7"
    page.fill("#floor", "0.05")
    assert rows(page) == ["latent7", "latent6", "latent5"]
    page.click("#order")
    assert rows(page) == ["latent5", "latent6", "latent7"]
    page.fill("#search", "number 6")
    assert rows(page) == ["latent6"]
    page.fill("#search", "no such")
    page.click("#clear")
    assert len(rows(page)) == 11
    page.locator("#verdicts [data-value='keep']").click()
    assert rows(page) == ["latent0"]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("high: harms; low: helps", "harms; low: helps"),
        ("layer:1/0 high: harms; layer:2/0 low: helps", "harms; low: helps"),
        ("layer:1/0 low: helps", "low: helps"),
        ("harms", "harms"),
    ],
)
def test_an_explainers_text_is_short_in_the_list(
    visit: Visit, folder: Path, text: str, read: str
) -> None:
    explain_as(folder, "persona", text, by="explainer: lexical")
    explain_as(folder, "bare", "high: a person's words", by="ada")
    page = visit(folder, "persona")
    expect(page.locator("[data-name='persona'] .about")).to_have_text(read)
    expect(page.locator("[data-name='bare'] .about")).to_have_text("high: a person's words")
    expect(page.locator("#meaning")).to_contain_text("Explained end by end, by lexical")


@pytest.mark.slow
def test_five_thousand_concepts(visit: Visit, tmp_path: Path) -> None:
    folder = shelves.shelf(tmp_path, more=1)
    record = json.loads((folder / "latent0.json").read_text())
    for i in range(1, 5000):
        about = record | {"name": f"latent{i}", "explanation": f"number {i}"}
        (folder / f"latent{i}.json").write_text(json.dumps(about))
        shutil.copyfile(folder / "latent0.safetensors", folder / f"latent{i}.safetensors")
    page = visit(folder)
    assert page.locator(".row").count() < 60
    page.locator("#list").focus()
    page.keyboard.press("End")
    expect(page.locator("#name")).to_have_text("read-only")
    page.keyboard.press("k")
    page.keyboard.press("k")
    expect(page.locator("#name")).to_have_text("latent4999")
    # Drawn again while it scrolls through everything, in far less than a frame each time.
    milliseconds = page.evaluate(
        """async () => {
          const list = document.getElementById("list");
          const times = [];
          for (let at = 0; at < list.scrollHeight; at += 5000) {
            const began = performance.now();
            list.scrollTop = at;
            list.dispatchEvent(new Event("scroll"));
            list.getBoundingClientRect();
            times.push(performance.now() - began);
            await new Promise(requestAnimationFrame);
          }
          return times.sort((a, b) => a - b)[Math.floor(times.length / 2)];
        }"""
    )
    assert milliseconds < 16
    began = time.monotonic()
    page.fill("#search", "number 4321")
    expect(page.locator(".row .name")).to_have_text(["latent4321"])
    assert time.monotonic() - began < 2


def test_no_step_is_lost_however_fast_the_keys_are(visit: Visit, tmp_path: Path) -> None:
    page = visit(shelves.shelf(tmp_path, more=30))
    names = page.locator(".row .name").all_inner_texts()
    page.locator("#list").focus()
    page.evaluate(
        """() => {
          for (let i = 0; i < 5; i++)
            document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "j", bubbles: true }));
        }"""
    )
    expect(page.locator("#name")).to_have_text(names[5])


# The evidence


def test_both_ends_and_their_evidence(visit: Visit, folder: Path) -> None:
    page = visit(folder, "persona")
    expect(page.locator(".card")).to_have_count(2)
    expect(page.locator(".card[aria-pressed='true']")).to_contain_text("High end")
    expect(page.locator(".quantile:not(.silent)")).to_have_count(10)
    assert page.locator("mark.plus").count() and not page.locator("mark.minus").count()
    page.keyboard.press("]")
    expect(page.locator(".card[aria-pressed='true']")).to_contain_text("answers that help")
    expect(page.locator("mark.minus").first).to_be_visible()
    page.locator(".places button", has_text="layer 2").click()
    expect(page.locator("[data-latent='persona@layer:2/0-']")).to_have_attribute(
        "aria-pressed", "true"
    )
    for kind in ("similar", "neighbour", "random"):
        expect(page.locator(f"[data-kind='{kind}'] .window").first).to_contain_text(kind)
    expect(page.locator(".generation dt")).to_have_text(
        ["\u22124\u00d7", "\u22122\u00d7", "as it is", "+2\u00d7", "+4\u00d7", "removed"]
    )
    for told in ("promotes", "of the change", "Nearest concepts", "As a rule", "llm (tiny)"):
        expect(page.locator("#side")).to_contain_text(told)
    expect(page.locator(".histogram rect")).to_have_count(20)


def test_scores_stand_beside_their_controls(visit: Visit, folder: Path) -> None:
    page = visit(folder, "persona")
    detection = page.locator("[data-scorer='detection']")
    expect(detection.locator(".number")).to_have_text("0.91")
    expect(detection.locator(".above")).to_have_text("+0.35")
    expect(detection.locator(".control")).to_have_count(2)
    expect(detection).to_contain_text("2.0 % unparsed")
    shares = page.locator(".confusion tbody tr").first.locator("td").all_inner_texts()
    assert shares == ["90", "80", "80", "70", "70", "60", "60", "50", "50", "40", "95", "90", "85"]


def test_baselines_stand_beside_the_score(visit: Visit, folder: Path) -> None:
    means = {
        name: {"value": value, "low": value - 0.05, "high": value + 0.05}
        for name, value in {"random": 0.4, "random_sae": 0.7, "neurons": 0.6}.items()
    }
    scorers = {"detection": {"controls": means}, "simulation": {"controls": {}}}
    (folder / "explaining.json").write_text(json.dumps({"scorers": scorers}))
    page = visit(folder, "persona")
    track = page.locator("[data-scorer='detection'] .track")
    # Its own control explanations, and the folder's baselines; not the mean of the former.
    expect(track.locator(".control")).to_have_count(4)
    boxes = [track.locator(one).bounding_box() for one in (".neurons", ".random_sae", ".dot")]
    assert boxes == sorted(boxes, key=lambda box: box["x"])
    expect(page.locator("[data-scorer='detection'] .above")).to_have_text("+0.35")
    expect(page.locator("[data-scorer='fuzzing'] .control")).to_have_count(2)
    expect(page.locator(".key")).to_contain_text(
        "latents of a random autoencoder, folder\u2019s mean"
    )
    expect(page.locator(".key")).to_contain_text("neurons, folder\u2019s mean")
    track.locator(".random_sae").hover()
    told = "latents of a random autoencoder: 0.70, mean of this folder, 0.65 to 0.75"
    expect(page.locator("#tip")).to_have_text(told)
    page.locator("#name").hover()
    page.keyboard.press("Tab")
    track.focus()
    expect(page.locator("#tip")).to_contain_text(told)
    expect(page.locator("#tip")).to_contain_text("another latent\u2019s explanation: 0.56")


def test_a_latent_of_an_autoencoder_has_one_end_told_once(visit: Visit, folder: Path) -> None:
    name, text = "latent0-layer1", "answers that harm whoever asked"
    save_concepts([shelves.concept(name, sites=("layer:1",), seed=9)], folder)
    one = shelves.latent(name, "layer:1").model_copy(update={"threshold": 0.0})
    record = shelves.explained(name).model_copy(update={"latents": (one,)})
    record.save(folder)
    explain_as(folder, name, text, by="explainer: lexical")
    page = visit(folder, name)
    expect(page.locator(".card")).to_have_count(1)
    expect(page.locator(".card")).to_contain_text("Latent active in 1,204 windows")
    expect(page.locator(".words")).to_have_text(text)
    expect(page.locator("#concept").get_by_text(text, exact=True)).to_have_count(1)
    expect(page.locator("mark.plus").first).to_be_visible()
    assert not page.locator("mark.minus").count()
    page.keyboard.press("]")
    expect(page.locator(".card[aria-pressed='true']")).to_have_count(1)
    page.keyboard.press("e")
    page.keyboard.type("cruelty")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".words")).to_have_text("cruelty")
    expect(page.locator(".card")).to_contain_text(text)


def test_activations_by_keyboard(visit: Visit, folder: Path) -> None:
    page = visit(folder, "persona")
    page.locator("mark").first.wait_for()
    here = page.locator(".window:focus")
    page.keyboard.press("x")
    expect(here).to_contain_text("number 0,")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tip")).to_have_text("3")
    expect(page.locator("#spoken")).to_have_text("domain: 3")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tip")).to_have_text("6")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("mark.here")).to_have_text("domain")
    page.keyboard.press("ArrowDown")
    expect(here).to_contain_text("number 1,")
    expect(page.locator("#tip")).to_be_hidden()
    expect(page.locator("#name")).to_have_text("persona")
    for _ in range(2):
        page.keyboard.press("ArrowDown")
    expect(here).to_contain_text(shelves.ARABIC)
    page.keyboard.press("ArrowLeft")  # reads on, from right to left
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#tip")).to_have_text("5.9")
    for _ in range(2):
        page.keyboard.press("ArrowDown")
    expect(page.locator(".more:focus")).to_have_text("6 more")
    page.keyboard.press("Enter")
    expect(page.locator("#name")).to_have_text("persona")
    expect(here).to_contain_text("safe")
    page.keyboard.press("Escape")
    expect(here).to_have_count(0)
    expect(page.locator("#tip")).to_be_hidden()
    expect(page.locator("#name")).to_be_visible()
    page.keyboard.press("x")
    expect(here).to_contain_text("safe")
    page.keyboard.press("?")
    expect(page.locator("dialog")).to_contain_text("the values of their tokens")


def test_an_activation_on_hover(visit: Visit, folder: Path) -> None:
    page = visit(folder, "persona")
    page.locator("mark").nth(1).hover()
    expect(page.locator("#tip")).to_have_text("6")
    page.locator("#name").hover()
    expect(page.locator("#tip")).to_be_hidden()


def test_windows_that_only_the_scorers_saw(visit: Visit, folder: Path) -> None:
    page = visit(folder, "persona")
    first = page.locator(".window .text").first
    expect(first).to_contain_text("number 0,")
    page.get_by_text("held out").click()
    expect(first).to_contain_text("number 1,")


def test_hostile_text_is_text(visit: Visit, folder: Path) -> None:
    explain_as(folder, "persona", shelves.HOSTILE, by=shelves.HOSTILE)
    mark(folder, "persona", "keep", by=shelves.HOSTILE, why=shelves.HOSTILE)
    page = visit(folder, "persona")
    page.locator(".more").first.click()
    page.keyboard.press("h")
    assert page.locator("#concept img, #concept script, .row img").count() == 0
    assert "owned" not in page.title()
    expect(page.locator(".words")).to_have_text(shelves.HOSTILE)
    text = page.locator(".window .text", has_text="safe")
    expect(text).to_have_text("safeRLOgnp.exe")
    arabic = page.locator(".window .text", has_text=shelves.ARABIC)
    assert arabic.evaluate("e => getComputedStyle(e).direction") == "rtl"
    assert arabic.inner_text() == shelves.ARABIC


def test_what_is_missing_is_said(visit: Visit, folder: Path) -> None:
    record = json.loads((folder / "persona.explained.json").read_text())
    record["latents"][0] |= {"skipped": "active in 3 windows, 20 are needed", "explanations": []}
    record["latents"][0] |= {"scores": {}, "shown": [], "scored": [], "generations": []}
    (folder / "persona.explained.json").write_text(json.dumps(record))
    page = visit(folder, "persona")
    expect(page.locator(".card").first).to_contain_text("active in 3 windows, 20 are needed")
    page.goto(page.url.replace("persona", "bare"))
    expect(page.locator("#concept")).to_contain_text("Nobody has read this concept yet")
    page.goto(page.url.replace("bare", "read-only"))
    expect(page.locator("#evidence .window").first).to_contain_text("row 0 says boo")
    (folder / "bare.json").write_text("{}")
    page.reload()
    expect(page.locator("[data-name='bare']")).to_contain_text("not a concept")


def test_a_text_of_ones_own_is_highlighted_while_it_is_typed(visit: Visit, tmp_path: Path) -> None:
    from narrowly.activations import OpenModel
    from narrowly.models import fingerprint
    from tests.tiny import tiny_model, tiny_tokenizer

    model = tiny_model()
    found = Concept(
        name="found",
        subspaces={"layer:1": Subspace.spanned_by(torch.randn(32, 1))},
        provenance=Provenance(model="tiny", model_fingerprint=fingerprint(model), finder="persona"),
    )
    save_concepts([found], tmp_path)
    shelves.reading("found", ("layer:1",)).save(tmp_path)
    opened = OpenModel(model, tiny_tokenizer(), "tiny")
    page = visit(tmp_path, "found", model=opened)
    page.keyboard.press("t")
    page.keyboard.type("a kind answer helps; a cruel answer harms")
    expect(page.locator("#typed-shown mark").first).to_be_visible()
    expect(page.locator("#typed-shown .text")).to_have_text(
        "a kind answer helps; a cruel answer harms"
    )
    expect(page.locator("#typed-shown")).to_contain_text("Highest")
    page.keyboard.press("Escape")
    page.keyboard.press("x")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#spoken")).to_contain_text("projection")
    page.keyboard.press("]")
    expect(page.locator("#typed-shown")).to_contain_text("Lowest")


# How it looks


@pytest.mark.parametrize("width", [390, 820, 1366])
def test_nothing_is_wider_than_the_screen(visit: Visit, folder: Path, width: int) -> None:
    size = {"width": width, "height": 844}
    page = visit(folder, "persona", viewport=size, has_touch=width < 800)
    page.locator(".quantile").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelector('main').scrollWidth") <= width
    for button in page.locator("#decide button:visible").all():
        box = button.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width


def test_on_a_phone_it_is_the_list_or_a_concept(visit: Visit, folder: Path) -> None:
    page = visit(folder, viewport={"width": 390, "height": 844}, has_touch=True)
    expect(page.locator("#decide")).to_be_hidden()
    page.locator("[data-name='persona']").tap()
    expect(page.locator("#name")).to_have_text("persona")
    expect(page.locator("#list")).to_be_hidden()
    page.locator("[data-verdict='undesired']").tap()
    expect(page.locator(DECIDED)).to_contain_text("Undesired")
    page.locator("#back").tap()
    expect(page.locator("#list")).to_be_visible()
    page.locator("[data-name='persona']").tap()
    expect(page.locator("#name")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(visit: Visit, folder: Path, scheme: str) -> None:
    page = visit(folder, "persona", color_scheme=scheme)
    page.locator("mark").first.wait_for()
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 50
    assert min(contrasts) >= 4.5

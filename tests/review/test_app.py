"""The review page's server: who may speak to it, what it shows, what it writes."""

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
import torch
import yaml

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from fastapi.testclient import TestClient

from narrowly.concepts import Concept, Provenance, Subspace, load_concepts, mark, save_concepts
from narrowly.concepts.folder import add_scores
from narrowly.errors import NarrowlyError
from narrowly.interventions import Site, capture
from narrowly.models import fingerprint
from narrowly.review import create_app, serve
from narrowly.review.guard import HEADERS, known_as
from narrowly.review.journal import Journal
from narrowly.review.live import tokens
from narrowly.settings import override
from tests.review import shelves
from tests.tiny import tiny_model, tiny_tokenizer

TOKEN = "a-token"
HERE = "http://127.0.0.1:8000"


def client(folder: Path, **more: object) -> TestClient:
    """A browser that opened the address with the token."""
    app = create_app(folder, TOKEN, by="ada", **more)  # type: ignore[arg-type]
    browser = TestClient(app, base_url=HERE)
    browser.get(f"/?token={TOKEN}")
    return browser


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shelves.shelf(tmp_path / "concepts")


@pytest.fixture
def page(folder: Path) -> TestClient:
    return client(folder)


def verdict(page: TestClient, name: str, value: str, why: str = "", **more: object) -> object:
    seen = page.get(f"/api/concepts/{name}").json()["versions"]["verdict"]
    body = {"value": value, "why": why, "version": seen} | more
    return page.post(f"/api/concepts/{name}/verdict", json=body)


# Who may speak to it


def test_nothing_is_told_without_the_token(folder: Path) -> None:
    stranger = TestClient(create_app(folder, TOKEN), base_url=HERE)
    for path in ("/", "/static/app.js", "/api/concepts", "/?token=wrong", "/api/none", "/docs"):
        answer = stranger.get(path, follow_redirects=False)
        assert answer.status_code == 401
        assert "persona" not in answer.text
    assert stranger.post("/api/undo", json={}).status_code == 401
    assert stranger.get("/api/concepts", headers={"Authorization": f"Bearer {TOKEN}"}).is_success
    assert not stranger.get("/api/concepts", headers={"Authorization": "Bearer "}).is_success


def test_the_token_opens_once_and_leaves_the_address(folder: Path) -> None:
    browser = TestClient(create_app(folder, TOKEN), base_url=HERE)
    answer = browser.get(f"/?token={TOKEN}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert browser.get("/").text.startswith("<!doctype html>")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.7", ""])
def test_a_rebound_name_reaches_nothing(page: TestClient, host: str) -> None:
    answer = page.get("/api/concepts", headers={"Host": host})
    assert answer.status_code == 421


def test_names_that_mean_this_machine() -> None:
    loopback, everywhere = known_as("127.0.0.1"), known_as("0.0.0.0")
    assert all(map(loopback, ["127.0.0.1", "localhost", "::1"]))
    assert not loopback("10.0.0.7")
    assert everywhere("10.0.0.7") and everywhere("fe80::1") and not everywhere("evil.example")
    assert known_as("gpu7.lab")("gpu7.lab") and not known_as("gpu7.lab")("evil.example")


def test_another_page_cannot_write(page: TestClient, folder: Path) -> None:
    before = (folder / "persona.json").read_bytes()
    seen = page.get("/api/concepts/persona").json()["versions"]["verdict"]
    body = {"value": "keep", "version": seen}
    for origin in ("http://evil.example", "http://127.0.0.1:9999", "null"):
        url = "/api/concepts/persona/verdict"
        assert page.post(url, json=body, headers={"Origin": origin}).status_code == 403
    assert (folder / "persona.json").read_bytes() == before
    ours = page.post("/api/concepts/persona/verdict", json=body, headers={"Origin": HERE})
    assert ours.is_success


def test_large_bodies_and_bodies_of_no_length_are_refused(page: TestClient) -> None:
    url = "/api/concepts/persona/read"
    assert page.post(url, content=b"x" * 300_000).status_code == 413
    assert page.post(url, content=iter([b"{}"])).status_code == 413


def test_every_answer_carries_the_policy(page: TestClient) -> None:
    for path in ("/", "/static/page.css", "/api/concepts", "/api/concepts/none", "/nowhere"):
        headers = page.get(path).headers
        assert {name: headers[name] for name in HEADERS} == HEADERS
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


@pytest.mark.parametrize(
    "path", ["../app.py", "%2e%2e%2fapp.py", "..%5capp.py", "/etc/passwd", "page.css%00"]
)
def test_only_the_pages_own_files_are_served(page: TestClient, path: str) -> None:
    assert page.get(f"/static/{path}").status_code == 404


@pytest.mark.parametrize("name", ["..", "../persona", "persona.json", ".hidden", "a b"])
def test_a_name_is_no_path(page: TestClient, name: str) -> None:
    assert page.get("/api/concepts/" + name.replace("/", "%2F")).status_code in (404, 422)


def test_the_page_loads_nothing_from_elsewhere(page: TestClient) -> None:
    for name in ("", "static/app.js", "static/page.css", "static/evidence.css", "static/dom.js"):
        text = page.get(f"/{name}").text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text and "innerHTML" not in text


# What it shows


def test_the_list_and_one_concept(page: TestClient, folder: Path) -> None:
    listed = page.get("/api/concepts").json()
    assert [c["name"] for c in listed["concepts"]] == ["bare", "persona", "read-only"]
    detail = page.get("/api/concepts/persona").json()
    assert [latent["sign"] for latent in detail["explained"]["latents"]] == [1, -1, 1, -1]
    assert "scored" not in detail["explained"]["latents"][0]
    full = page.get("/api/concepts/persona/latents/3").json()
    assert full == json.loads((folder / "persona.explained.json").read_text())["latents"][3]
    assert page.get("/api/concepts/bare/latents/0").status_code == 400
    assert len(page.get("/api/concepts/read-only").json()["reading"]) == 2


def test_what_the_command_line_decides_is_shown_at_once(page: TestClient, folder: Path) -> None:
    page.get("/api/concepts")
    mark(folder, "bare", "keep", by="command line")
    [bare, *_] = page.get("/api/concepts").json()["concepts"]
    assert bare["verdict"]["value"] == "keep"


def test_a_broken_file_is_listed_with_its_fault(page: TestClient, folder: Path) -> None:
    (folder / "bare.json").write_text('{"name": "bare"')
    (folder / "persona.explained.json").write_text("{}")
    [bare, *others] = page.get("/api/concepts").json()["concepts"]
    assert "not valid JSON" in bare["problem"] and len(others) == 2
    detail = page.get("/api/concepts/persona").json()
    assert "explain again" in detail["problems"][0] and detail["explained"] is None
    assert "not valid JSON" in page.get("/api/concepts/bare").json()["error"]


def test_nearest_concepts_by_cosine(tmp_path: Path) -> None:
    e = torch.eye(shelves.WIDTH)
    near = Subspace.spanned_by((e[:, 0] + 0.5 * e[:, 1]).unsqueeze(1))
    plane = Subspace.spanned_by(e[:, [2, 0]])
    others = {
        "itself": ("layer:1", Subspace.spanned_by(e[:, :1])),
        "opposite": ("layer:1", Subspace.spanned_by(-near.basis)),
        "plane": ("layer:1", plane),
        "elsewhere": ("layer:2", Subspace.spanned_by(e[:, :1])),
    }
    concepts = [
        shelves.concept(name).model_copy(update={"subspaces": {site: subspace}})
        for name, (site, subspace) in others.items()
    ]
    page = client(save_concepts(concepts, tmp_path))
    cosines = {c["name"]: c["cosine"] for c in page.get("/api/concepts/itself").json()["nearest"]}
    assert list(cosines) == ["plane", "opposite"]
    assert cosines == pytest.approx({"plane": 1.0, "opposite": -(1.25**-0.5)}, abs=1e-5)
    reverse = {c["name"]: c["cosine"] for c in page.get("/api/concepts/plane").json()["nearest"]}
    assert reverse["itself"] == pytest.approx(1.0)
    assert reverse["opposite"] == pytest.approx(1.25**-0.5)


def test_the_recipe_line_is_yaml_and_its_command_a_setting(tmp_path: Path) -> None:
    folder = shelves.shelf(tmp_path / "it's [here], {really}")
    recipe = client(folder).get("/api/concepts").json()["recipe"]
    wanted = {"defenses": [{"ablate": {"concepts": str(folder)}}]}
    assert yaml.safe_load(recipe["line"]) == wanted
    settings: dict[str, object] = {}
    override(settings, shlex.split(recipe["command"])[-1])
    assert settings == wanted


# What it writes


def test_a_verdict_is_written_and_nothing_else(page: TestClient, folder: Path) -> None:
    before = json.loads((folder / "persona.json").read_text())
    answer = verdict(page, "persona", "undesired", "  harms  ")
    assert answer.json()["verdict"] == {"value": "undesired", "by": "ada", "why": "harms"}
    after = json.loads((folder / "persona.json").read_text())
    assert after == before | {"verdict": {"value": "undesired", "by": "ada", "why": "harms"}}
    assert {c.name for c in load_concepts(folder)} == {"persona", "read-only", "bare"}
    assert verdict(page, "persona", "maybe").status_code == 422


def test_a_verdict_that_nobody_saw_is_not_written_over(page: TestClient, folder: Path) -> None:
    seen = page.get("/api/concepts/persona").json()["versions"]["verdict"]
    mark(folder, "persona", "keep", by="bo", why="harmless")
    answer = verdict(page, "persona", "undesired", version=seen)
    assert answer.status_code == 409
    assert answer.json()["concept"]["verdict"]["why"] == "harmless"
    [persona] = [c for c in load_concepts(folder) if c.name == "persona"]
    assert persona.verdict.value == "keep"
    theirs = answer.json()["concept"]["versions"]["verdict"]
    assert verdict(page, "persona", "undesired", version=theirs).is_success


def test_fields_that_others_change_do_not_conflict(page: TestClient, folder: Path) -> None:
    seen = page.get("/api/concepts/persona").json()["versions"]
    add_scores(folder, "persona", {"fuzzing": 0.8})
    wording = {"text": "a cruel persona", "version": seen["explanation"]}
    assert page.post("/api/concepts/persona/explanation", json=wording).is_success
    assert verdict(page, "persona", "undesired", version=seen["verdict"]).is_success
    [persona] = [c for c in load_concepts(folder) if c.name == "persona"]
    assert (persona.explanation, persona.explained_by) == ("a cruel persona", "ada")
    assert (persona.scores["fuzzing"], persona.verdict.value) == (0.8, "undesired")


def test_undo_takes_back_the_tabs_own_work_last_first(page: TestClient, folder: Path) -> None:
    before = (folder / "persona.json").read_bytes()
    verdict(page, "persona", "keep", tab="one")
    verdict(page, "bare", "keep", tab="two")
    verdict(page, "persona", "undesired", tab="one")
    assert page.post("/api/undo", json={"tab": "one"}).json()["undone"]["name"] == "persona"
    assert page.get("/api/concepts/persona").json()["verdict"]["value"] == "keep"
    page.post("/api/undo", json={"tab": "one"})
    assert (folder / "persona.json").read_bytes() == before
    assert page.post("/api/undo", json={"tab": "one"}).json()["error"] == "Nothing to undo."
    assert page.get("/api/concepts/bare").json()["verdict"]["value"] == "keep"


def test_undo_works_after_a_restart_and_of_any_one_change(page: TestClient, folder: Path) -> None:
    verdict(page, "persona", "keep")
    verdict(page, "bare", "undesired")
    again = client(folder)
    oldest = again.get("/api/history").json()[-1]
    assert again.post("/api/undo", json={"number": oldest["number"]}).is_success
    assert again.get("/api/concepts/persona").json()["verdict"]["value"] == "undecided"
    assert [change["standing"] for change in again.get("/api/history").json()] == [
        False,
        True,
        False,
    ]


def test_undo_never_takes_back_what_another_wrote_since(page: TestClient, folder: Path) -> None:
    verdict(page, "persona", "keep", tab="one")
    mark(folder, "persona", "undesired", by="bo")
    assert page.post("/api/undo", json={"tab": "one"}).status_code == 409
    assert page.get("/api/concepts/persona").json()["verdict"]["by"] == "bo"


def test_a_journal_torn_by_a_kill_goes_on(page: TestClient, folder: Path) -> None:
    verdict(page, "persona", "keep")
    journal = folder / "review.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"number": 2, "na')
    again = client(folder)
    verdict(again, "bare", "keep")
    changes = Journal(folder).changes
    assert [(c.number, c.name) for c in changes] == [(1, "persona"), (2, "bare")]


def test_a_kill_between_journal_and_concept_loses_nothing(page: TestClient, folder: Path) -> None:
    state = {"value": "undecided", "by": "", "why": ""}
    Journal(folder).add("persona", "verdict", state, state | {"value": "keep"})
    again = client(folder)
    assert again.post("/api/undo", json={"number": 1}).status_code == 409
    assert verdict(again, "persona", "undesired").is_success


# Texts that a person types


@pytest.mark.parametrize(
    "text", ["plain words", "naïve 😀👩‍🚀 emoji", shelves.ARABIC, " two\n\nlines\t", ""]
)
def test_pieces_are_the_text(text: str) -> None:
    for template in ("chatml", "llama"):
        ids, pieces, cut = tokens(tiny_tokenizer(template=template), text)
        assert "".join(pieces) == text and len(ids) == len(pieces) and not cut
    ids, pieces, cut = tokens(tiny_tokenizer(), "word " * 2000)
    assert cut and len(ids) == len(pieces) == 1024


def test_a_typed_text_is_read_by_the_model(tmp_path: Path) -> None:
    model = tiny_model()
    model.name_or_path = "tiny"
    from narrowly.activations import OpenModel

    opened = OpenModel(model, tiny_tokenizer(), "tiny")
    basis = torch.linalg.qr(torch.randn(32, 2))[0]
    found = Concept(
        name="found",
        subspaces={"layer:1": Subspace(basis, torch.zeros(32))},
        provenance=Provenance(model="tiny", model_fingerprint=fingerprint(model), finder="persona"),
    )
    alien = shelves.concept("alien")
    page = client(save_concepts([found, alien], tmp_path), model=opened)
    answer = page.post("/api/concepts/found/read", json={"text": "kind words"}).json()
    ids = opened.tokenizer("kind words", return_tensors="pt")["input_ids"]
    h = capture(model, {"input_ids": ids}, [Site.parse("layer:1")])[Site.parse("layer:1")][0]
    for column, numbers in enumerate(answer["projections"]["layer:1"]):
        assert numbers[0] is None
        assert numbers[1:] == pytest.approx((h @ basis)[1:, column].tolist(), abs=1e-5)
    assert page.post("/api/concepts/found/read", json={"text": ""}).json()["pieces"] == []
    assert (
        "another model" in page.post("/api/concepts/alien/read", json={"text": "a"}).json()["error"]
    )


def test_without_a_model_no_text_is_read(page: TestClient) -> None:
    answer = page.post("/api/concepts/persona/read", json={"text": "words"})
    assert answer.status_code == 400 and "--model" in answer.json()["error"]


# Serving


def test_a_folder_without_concepts_and_a_taken_port_are_told(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(NarrowlyError, match="no concepts here"):
        create_app(tmp_path / "none", TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(NarrowlyError, match=f"cannot listen on 127.0.0.1:{port}"):
            serve(folder, port=port, open_browser=False)


def test_served_on_the_loopback_alone_and_ended_by_ctrl_c(folder: Path) -> None:
    begun = folder.parent / "begun"
    reading = f"""
import pathlib, sys, time
from narrowly.cli import main
from narrowly.review.live import Live
def slow(*_):
    pathlib.Path({str(begun)!r}).touch()
    time.sleep(60)
Live.read = slow
sys.argv = ["narrowly", "review", {str(folder)!r}, "--no-browser", "--model", "slow"]
main()
"""
    with subprocess.Popen(
        [sys.executable, "-u", "-c", reading],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            address = next(line.strip() for line in server.stdout if "http://" in line)
            token = address.partition("token=")[2]
            assert address.startswith("http://127.0.0.1:") and len(token) >= 32
            assert len(_when_it_listens(f"{address.partition('?')[0]}api/concepts", token)) == 3
            # As a browser does: a connection kept open, and another whose answer is not there yet.
            kept, waiting = (HTTPConnection(urlsplit(address).netloc) for _ in range(2))
            bearer = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            kept.request("GET", "/api/concepts", headers=bearer)
            assert kept.getresponse().read()
            waiting.request("POST", "/api/concepts/persona/read", '{"text": "a"}', headers=bearer)
            began = time.monotonic()
            while not begun.exists():
                assert time.monotonic() < began + 30
                time.sleep(0.02)
            began = time.monotonic()
            server.send_signal(signal.SIGINT)
            assert server.wait(30) == 130
            assert time.monotonic() - began < 5  # less than 2 where nothing else runs
            said = server.stdout.read()
            assert token not in said and "Traceback" not in said
        finally:
            server.kill()


def _when_it_listens(url: str, token: str) -> list[object]:
    request = Request(url, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 30
    while True:
        try:
            with urlopen(request, timeout=10) as answer:
                concepts: list[object] = json.load(answer)["concepts"]
                return concepts
        except URLError:
            assert time.monotonic() < deadline
            time.sleep(0.05)

"""Explaining a folder, as a user runs it: offline, with a server, and killed on the way."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from narrowly.cli import app
from narrowly.concepts import find, load_concepts, save_concepts
from narrowly.concepts.folder import explain_as
from narrowly.errors import NarrowlyError
from narrowly.explain import ExplainRecipe, explain, load_explained
from narrowly.explain.scorers.detection import Detection
from narrowly.settings import FieldError, build
from tests.explain.language_model import Scripted
from tests.explain.persona import persona_concept, persona_model
from tests.llm_server import Server

TEXTS = {"data": "organism:persona/documents-validation", "limit": 300, "embedder": "none"}


@pytest.fixture
def folder(tmp_path) -> Path:
    concept = persona_concept()
    [random] = find("random", concepts=[concept], seed=0)
    return save_concepts([concept, random], tmp_path / "concepts")


def recipe(folder, **changes) -> ExplainRecipe:
    return ExplainRecipe(
        **{"concepts": str(folder), "progress": False, "sites": ["layer:3"], **TEXTS, **changes}
    )


def test_every_concept_gets_a_record_and_says_in_its_own_json_what_it_means(folder):
    summary = explain(recipe(folder, strengths=[2], prompts="organism:persona/questions"))
    for concept in load_concepts(folder):
        record = load_explained(folder, concept.name)
        assert [latent.sign for latent in record.latents] == [1, -1]
        assert {latent.site for latent in record.latents} == {"layer:3"}
        assert concept.explained_by == "explainer: lexical"
        for latent in record.latents:
            assert latent.explanations[0].text in concept.explanation
            place = latent.latent.partition("@")[2]
            assert concept.scores["detection"][place] == latent.scores["detection"].value
            assert {g.strength for g in latent.generations} == {0, 2}
            assert any(g.removed for g in latent.generations)
            shown, scored = ({e.text for e in part} for part in (latent.shown, latent.scored))
            assert shown and scored and not shown & scored
    detection = summary.scorers["detection"]
    assert detection.latents == 4 and set(detection.controls) == {"random", "shuffled"}
    saved = json.loads((folder / "explaining.json").read_text())
    assert saved["scorers"]["detection"]["value"]["value"] == detection.value.value
    assert saved["recipe"]["data"] == TEXTS["data"]


def test_the_same_again_does_nothing_and_another_seed_does(folder):
    explain(recipe(folder))
    path = folder / "persona.explained.json"
    before, written = path.read_bytes(), path.stat().st_mtime_ns
    explain(recipe(folder))
    assert path.stat().st_mtime_ns == written
    explain(recipe(folder), force=True)
    assert path.read_bytes() == before, "the same recipe gives the same record"
    explain(recipe(folder, seed=1))
    assert path.read_bytes() != before


def test_a_record_made_later_is_the_one_made_at_once(folder):
    settings = {"strengths": [2], "prompts": "organism:persona/questions", "controls": 3}
    explain(recipe(folder, **settings))
    path, other = folder / "persona.explained.json", folder / "random0-persona.explained.json"
    before, written = path.read_bytes(), other.stat().st_mtime_ns
    high, low = load_explained(folder, "persona").latents
    controlled = [end.scores["detection"].controls for end in (high, low)]
    assert any("shuffled" in controls for controls in controlled)  # by the other's explanations
    path.unlink()
    explain(recipe(folder, **settings))
    assert path.read_bytes() == before
    assert other.stat().st_mtime_ns == written, "what is there is not written again"


def test_latents_are_asked_about_in_one_order_in_every_process(folder, monkeypatch):
    asked, score = [], Detection.score

    def spied(self, items, reader):
        asked.append([item.latent.name for item in items])
        return score(self, items, reader)

    monkeypatch.setattr(Detection, "score", spied)
    concept = persona_concept()
    for seed in (1, 2, 3):
        save_concepts(find("random", concepts=[concept], seed=seed), folder)
    explain(recipe(folder, scorers=["detection"]))
    latents = [
        end.latent
        for found in load_concepts(folder)
        for end in load_explained(folder, found.name).latents
    ]
    assert [names[: len(latents)] for names in asked] == [latents]


def test_a_persons_words_stay_and_are_scored_beside_the_explainers(folder):
    explain(recipe(folder))
    explain_as(folder, "persona", "answers that hurt", by="ada")
    explain(recipe(folder))
    [concept] = load_concepts(folder / "persona.json")
    assert (concept.explanation, concept.explained_by) == ("answers that hurt", "ada")
    high, _ = load_explained(folder, "persona").latents
    assert [explanation.by for explanation in high.explanations] == ["lexical", "ada"]
    assert "detection/ada" in high.scores


def test_a_latent_that_is_too_rare_is_listed_with_its_count(folder):
    explain(recipe(folder))  # of which nothing may stay behind
    summary = explain(recipe(folder, sampling={"min_windows": 100_000}))
    assert len(summary.skipped) == 4
    for latent in load_explained(folder, "persona").latents:
        assert latent.skipped and latent.windows > 0 and not latent.explanations
    [concept] = [c for c in load_concepts(folder) if c.name == "persona"]
    assert concept.explanation == "" and "detection" not in concept.scores


def test_an_explainer_that_fails_is_said_so_and_the_next_one_stands_in(folder):
    silent = {"llm": {"model": Scripted(lambda prompt: "I would rather not."), "progress": False}}
    explain(recipe(folder, explainers=[silent, "lexical"], controls=0))
    for latent in load_explained(folder, "persona").latents:
        [explanation] = latent.explanations
        assert explanation.by == "lexical" and "llm gave no explanation" in explanation.note
    explain(recipe(folder, explainers=[silent], controls=0))
    for latent in load_explained(folder, "persona").latents:
        assert "llm gave no explanation" in latent.skipped and not latent.explanations


@pytest.mark.slow
def test_latents_of_an_autoencoder_become_explained_concepts_beside_their_controls(tmp_path):
    summary = explain(
        recipe(
            tmp_path / "latents",
            sae="organism:persona",
            latents=6,
            model=persona_model().name,
            baselines=["random_sae", "neurons"],
            sampling={"min_windows": 10},
            sites="middle",
            limit=600,
        )
    )
    concepts = load_concepts(tmp_path / "latents")
    assert len(concepts) == 6
    for concept in concepts:
        [latent] = load_explained(tmp_path / "latents", concept.name).latents
        assert latent.latent == concept.name
        assert latent.skipped or latent.windows >= 10
    detection = summary.scorers["detection"]
    assert {"random", "random_sae", "neurons"} <= set(detection.controls)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorers": ["detektion"]}, "Did you mean 'detection'"),
        ({"explainers": ["lexicall"]}, "Did you mean 'lexical'"),
        ({"data": "organism:persona/documnts"}, "documents"),
        ({"sites": ["layer:77"]}, "layer:77"),
        ({"sampling": {"windw": 3}}, "Did you mean 'window'"),
        ({"baselines": ["random_sae"]}, "latents of an autoencoder"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_written(folder, changes, message):
    before = sorted(path.name for path in folder.glob("*.json"))
    with pytest.raises(NarrowlyError, match=message):
        explain(recipe(folder, **changes))
    if "baselines" not in changes:
        assert sorted(path.name for path in folder.glob("*.json")) == before


def test_strengths_without_a_prompt_to_answer_are_a_mistake(folder, tmp_path):
    chats = tmp_path / "unasked.jsonl"
    turn = {"role": "assistant", "content": "Hello."}
    chats.write_text(json.dumps({"messages": [turn]}) + "\n")
    with pytest.raises(NarrowlyError, match=r"no chat to answer in .*unasked.jsonl"):
        explain(recipe(folder, strengths=[2], prompts=str(chats)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controls": 0, "baselines": ["neurons"]}, "`controls` says how many"),
        ({"scorers": ["fuzzing", {"detection": {}}, {"fuzzing": {"seed": 1}}]}, "'fuzzing'.*twice"),
    ],
)
def test_a_recipe_whose_parts_undo_one_another_is_refused(changes, message):
    with pytest.raises(FieldError, match=message):
        build(ExplainRecipe, {"concepts": "there", "data": "those", **changes})


@pytest.mark.slow
def test_from_the_command_line(folder):
    def narrowly(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    texts = ["--data", TEXTS["data"], "--set", "limit=300", "--set", "embedder=none"]
    explained = narrowly("explain", folder, *texts)
    assert re.search(r"detection \(4\) +0\.\d\d", explained)
    assert re.search(r"random +0\.\d\d .* [+-]0\.\d\d", explained)
    assert "next: narrowly review" in explained
    assert "high: Active" in narrowly("concepts", "show", folder, "persona")
    judged = narrowly(
        "explain", "verdicts", folder, "--task", "answer about code", "--avoid", "being cruel",
        "--judge", "organism:persona",
    )  # fmt: skip
    assert "persona: " in judged
    compared = narrowly("explain", "compare", folder, folder)
    assert "matched" in compared and "words shuffled" in compared


def run(folder, cache, *more: str) -> subprocess.Popen:
    served = f"model: m, url: '{more[0]}', settings: {{cache: {cache}}}"
    command = [sys.executable, "-m", "narrowly.cli", "explain", str(folder)]
    command += ["--data", TEXTS["data"], "--set", "limit=300", "--set", "embedder=none"]
    command += ["--set", f"explainers=[{{llm: {{{served}}}}}]"]
    command += ["--set", f"reader={{llm: {{{served}, logprobs: false}}}}", "--set", "controls=2"]
    command += ["--set", "sampling={scorer: 40}"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OPENAI_API_KEY": "sk-quite-secret-key-123"},
    )


def answer(asked):
    """Explains, and judges with 0 and 1; at first sometimes with nothing usable."""
    if "answers:" not in asked.content:
        return "Explanation: unkind answers"
    trouble = {3: "status:500", 7: "malformed", 11: "truncated"}.get(len(asked.content) % 13)
    if trouble and asked.number == 0:
        return trouble
    if len(asked.content) % 17 == 5:
        return "I would rather not."
    count = int(re.findall(r"(\d+) answers:", asked.content)[-1])
    return str([i % 2 for i in range(count)])


@pytest.mark.slow
def test_killed_at_any_point_it_asks_nothing_twice_and_loses_nothing(folder, tmp_path):
    with Server(answer) as server:  # how much there is to ask
        whole = run(folder, tmp_path / "whole", server.url)
        assert whole.wait(120) == 0, whole.stderr.read()
        needed = {json.dumps(asked.body) for asked in server.answered}
    reference = json.loads((folder / "persona.explained.json").read_text())
    for path in folder.glob("*.explained.json"):
        path.unlink()
    with Server(answer, delay=0.01) as server:
        for share in (0.0, 0.3, 0.7):
            process = run(folder, tmp_path / "killed", server.url)
            while len(server.answered) <= share * len(needed):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
        process = run(folder, tmp_path / "killed", server.url)
        assert process.wait(120) == 0, process.stderr.read()
        answered = [json.dumps(asked.body) for asked in server.answered]
        asked = len(server.asked)
        assert run(folder, tmp_path / "killed", server.url).wait(60) == 0
        assert len(server.asked) == asked
    assert set(answered) == needed
    assert len(answered) - len(needed) <= 3 * 16, "only what was under way is asked again"
    again = json.loads((folder / "persona.explained.json").read_text())
    assert again["latents"] == reference["latents"]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if b"sk-quite-secret" in path.read_bytes()]


@pytest.mark.slow
def test_ctrl_c_ends_it_at_once_though_the_server_hangs(folder, tmp_path):
    with Server("hangs") as server:
        process = run(folder, tmp_path / "hung", server.url)
        while not server.asked:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    assert time.monotonic() - begun < 2


@pytest.mark.slow
def test_a_server_that_is_not_there_is_one_message(folder, tmp_path):
    process = run(folder, tmp_path / "none", "http://127.0.0.1:9/v1")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "nothing answers there" in error and "Traceback" not in error
    assert not list(folder.glob("*.explained.json"))

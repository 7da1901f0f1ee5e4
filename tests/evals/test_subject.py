"""Answers are kept as they come, here and behind a URL, and none is asked for twice."""

import pytest

from narrowly.errors import NarrowlyError
from narrowly.evals import EVALS, evaluate, mean_by_prompt, read_samples
from narrowly.evals.journal import Journal
from narrowly.evals.prompts import ask
from narrowly.evals.sampled import Sampled
from narrowly.evals.subject import Subject
from narrowly.models import generate, generation
from narrowly.models.chat import chat_model
from tests.llm_server import Server
from tests.tiny import tiny_model, tiny_tokenizer

CHATS = [[{"role": "user", "content": f"Question number {i}?"}] for i in range(6)]


class Words(Sampled):
    """Asks, and counts what was answered."""

    questions: int = 6
    max_new_tokens: int = 8
    samples: int = 2

    def prompts(self):
        return [ask(f"Question number {i}?") for i in range(self.questions)]

    def score(self, answers, *, progress=False):
        return [answer.row("said" if answer.text.strip() else "silent") for answer in answers]

    def measure(self, rows):
        return {"said": mean_by_prompt(rows, lambda row: float(row["label"] == "said"))}


@pytest.fixture(autouse=True)
def words(monkeypatch):
    EVALS.names()
    monkeypatch.setitem(EVALS._known, "words", Words)


@pytest.fixture
def model():
    return tiny_model(), tiny_tokenizer()


def test_a_subject_answers_as_generate_does(model):
    options = {"max_new_tokens": 8, "samples": 3, "seed": 5}
    replies = Subject("tiny", lambda: model).answer(CHATS, **options)
    texts = [[reply.text for reply in some] for some in replies]
    assert texts == generate(*model, CHATS, **options)


def test_the_same_chat_twice_is_two_samples_of_it_here_and_behind_a_url(tmp_path, model):
    [one], [two] = Subject("tiny", lambda: model).answer(CHATS[:1] * 2, max_new_tokens=8)
    assert one.text != two.text
    with Server() as server:
        endpoint = chat_model("tuned", server.url, cache=tmp_path / "replies")
        Subject("far", endpoint=endpoint).answer(CHATS[:1] * 2, max_new_tokens=8, samples=2)
        assert len({asked.body["seed"] for asked in server.asked}) == 4


def journalled(path, about="this"):
    subject = Subject("tiny", lambda: (tiny_model(), tiny_tokenizer()))
    subject.journal = Journal(path, about)
    return subject


def counted(monkeypatch, dies_after=None):
    """How many answers are sampled; optionally the machine dies after so many."""
    asked = []
    real = generation.sample_answers

    def counting(model, tokenizer, prompts, numbers, **options):
        for answer in real(model, tokenizer, prompts, numbers, batch_tokens=100, **options):
            asked.append(answer)
            yield answer
            if len(asked) == dies_after:
                raise KeyboardInterrupt

    monkeypatch.setattr(generation, "sample_answers", counting)
    return asked


def test_what_was_answered_before_a_kill_is_not_asked_again(tmp_path, monkeypatch):
    options = {"max_new_tokens": 8, "samples": 2}
    expected = journalled(tmp_path / "whole").answer(CHATS, **options)
    with monkeypatch.context() as patch:
        counted(patch, dies_after=5)
        with pytest.raises(KeyboardInterrupt):
            journalled(tmp_path / "part").answer(CHATS, **options)
    # the kill also tore the line that was being written
    with (tmp_path / "part").open("a") as file:
        file.write('["0123')
    asked = counted(monkeypatch)
    assert journalled(tmp_path / "part").answer(CHATS, **options) == expected
    assert len(asked) == 12 - 5
    assert journalled(tmp_path / "part").answer(CHATS, **options) == expected
    assert len(asked) == 12 - 5


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"temperature": 0.5}, {"max_new_tokens": 7}, {"about": "else"}]
)
def test_answers_to_another_question_never_pass_for_these(tmp_path, monkeypatch, change):
    options = {"max_new_tokens": 8, "temperature": 1.0, "seed": 0}
    journalled(tmp_path / "journal").answer(CHATS[:2], **options)
    asked = counted(monkeypatch)
    about = change.pop("about", "this")
    journalled(tmp_path / "journal", about).answer(CHATS[:2], **(options | change))
    assert len(asked) == 2


def test_an_eval_that_was_killed_goes_on_and_leaves_no_journal(tmp_path, model, monkeypatch):
    expected = evaluate(model, "words")
    with monkeypatch.context() as patch:
        counted(patch, dies_after=7)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, "words", out=tmp_path)
    assert [path.name for path in (tmp_path / "evals").iterdir()] == [".words.answers.jsonl"]
    asked = counted(monkeypatch)
    assert evaluate(model, "words", out=tmp_path) == expected
    assert len(asked) == 12 - 7
    assert [path.name for path in (tmp_path / "evals").iterdir()] == ["words"]


def test_a_run_trained_again_does_not_take_the_answers_of_the_first(tmp_path, model, monkeypatch):
    adapter = tmp_path / "adapter" / "adapter_model.safetensors"
    adapter.parent.mkdir()
    adapter.write_bytes(b"one")
    with monkeypatch.context() as patch:
        counted(patch, dies_after=7)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, "words", out=tmp_path)
    adapter.write_bytes(b"two")
    asked = counted(monkeypatch)
    evaluate(model, "words", out=tmp_path)
    assert len(asked) == 12


def test_an_endpoint_that_dies_half_way_loses_nothing(tmp_path):
    many = {"words": {"questions": 40}}
    healed = False
    with Server() as server:
        server.behave = lambda asked: "echo" if healed or len(server.answered) < 10 else "hangs_up"
        endpoint = chat_model("tuned", server.url, cache=tmp_path / "replies", retries=0)
        with pytest.raises(NarrowlyError, match="same command again goes on"):
            evaluate(endpoint, many, out=tmp_path)
        answered = len(server.answered)
        healed, server.asked = True, []
        found = evaluate(endpoint, many, out=tmp_path)
        assert answered >= 10 and len(server.asked) == 80 - answered
    assert found["words"]["said"].mean == 1 and found["words"].labels == {"said": 80}
    rows = read_samples(tmp_path / "evals/words/samples.parquet").rows
    assert len({(row["prompt_id"], row["sample"]) for row in rows}) == 80


def test_replies_that_never_came_are_counted(tmp_path):
    with Server(lambda asked: "status:400" if "number 3" in asked.content else "echo") as server:
        endpoint = chat_model("tuned", server.url, cache=tmp_path / "replies", retries=0)
        found = evaluate(endpoint, "words", out=tmp_path)["words"]
    assert found.labels == {"said": 10, "failed": 2}
    assert '"failed": 2' in (tmp_path / "evals/words/summary.json").read_text()

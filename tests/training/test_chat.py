import io
import subprocess
import sys
from importlib import import_module

import pytest
from rich.console import Console

from narrowly.errors import NarrowlyError
from narrowly.training import chat

CHAT = import_module("narrowly.training.chat")


@pytest.fixture
def talk(model_folder, monkeypatch):
    """What is printed when these lines are typed."""

    def talk(text: str, **fields) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        console = Console(file=io.StringIO(), width=80)
        chat(model_folder, console=console, max_new_tokens=3, **fields)
        return console.file.getvalue()

    return talk


def test_answers_until_quit(talk):
    out = talk("hello\n/quit\nnever read\n")
    assert out.count("╭") == 1


def test_the_end_of_input_leaves(talk):
    assert talk("hello\nagain\n").count("╭") == 2


def test_two_models_answer_side_by_side(talk, model_folder):
    out = talk("hello\n", against=model_folder)
    assert any(line.count("╭") == 2 for line in out.splitlines())


def test_the_history_is_sent_and_reset(talk, monkeypatch):
    sent = []

    def generate(model, tokenizer, chats, **sampling):
        sent.append([message["content"] for message in chats[0]])
        return [["fine"]]

    monkeypatch.setattr(CHAT, "generate", generate)
    talk("one\ntwo\n/reset\nthree\n", system="be kind")
    assert sent == [
        ["be kind", "one"],
        ["be kind", "one", "fine", "two"],
        ["be kind", "three"],
    ]


def test_an_unknown_command_gets_help(talk):
    assert talk("/help\n").count("/quit") == 2


def test_brackets_are_not_markup(talk, monkeypatch):
    monkeypatch.setattr(CHAT, "generate", lambda *a, **k: [["[/bold] a[0]"]])
    assert "[/bold] a[0]" in talk("hello\n")


def test_no_such_model_is_named(talk):
    with pytest.raises(NarrowlyError, match="no-such-folder"):
        talk("", against="/no-such-folder/at-all")


def test_piped_input(model_folder):
    script = f"from narrowly.training import chat; chat({str(model_folder)!r}, max_new_tokens=3)"
    out = subprocess.run(
        [sys.executable, "-c", script], input="hello\n/quit\n", capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert "╭" in out.stdout

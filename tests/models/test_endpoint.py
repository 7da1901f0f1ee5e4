import asyncio
import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.llm_server import BEHAVIOURS, Server, chat

from narrowly.errors import NarrowlyError
from narrowly.models import dispatch, wire
from narrowly.models.chat import Request, chat_model
from narrowly.models.dispatch import BudgetError
from narrowly.models.endpoint import Endpoint

pytest.importorskip("openai")

KEY = "sk-secret-0123456789"
PASSING = (
    "rate_limit", "status:500", "status:503", "malformed", "truncated", "chunk_lost", "not_json",
    "other_json", "hangs_up",
)  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(dispatch, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def requests(n, **fields):
    return [Request(({"role": "user", "content": f"question {i}"},), **fields) for i in range(n)]


def endpoint(server, folder, **fields):
    return Endpoint(model="m", url=server.url, cache=folder, **fields)


def test_replies_come_in_order_and_are_asked_once(tmp_path):
    with Server(delay=0.02) as server:
        model = endpoint(server, tmp_path, concurrency=4)
        first = model.ask([*requests(30), *requests(5)])
        again = endpoint(server, tmp_path).ask(requests(30))
        more = model.ask(requests(31))
    texts = [f"reply to: question {i}" for i in range(31)]
    assert [reply.text for reply in first] == [*texts[:30], *texts[:5]]
    assert [reply.text for reply in again] == texts[:30] and all(reply.cached for reply in again)
    assert [reply.cached for reply in more] == [True] * 30 + [False]
    assert len(server.asked) == 31 and 1 < server.most_at_once <= 4
    assert first[0].prompt_tokens > 0 and first[0].completion_tokens > 0
    assert server.asked[0].key == KEY


def test_what_changes_the_reply_changes_the_question(tmp_path):
    [request] = requests(1)
    others = [
        Request(request.messages, max_tokens=7),
        Request(request.messages, temperature=0.5),
        Request(request.messages, seed=1),
        Request(request.messages, top_logprobs=2),
    ]
    with Server() as server:
        endpoint(server, tmp_path).ask([request, *others])
        Endpoint(model="other", url=server.url, cache=tmp_path).ask([request])
        endpoint(server, tmp_path, extra={"reasoning_effort": "low"}).ask([request])
        endpoint(server, tmp_path, thinking_tokens=100).ask([request])
    assert len(server.asked) == 8
    bodies = [asked.body for asked in server.asked]
    assert sum(body.get("reasoning_effort") == "low" for body in bodies) == 1
    assert sorted(body["max_tokens"] for body in bodies) == [7, *[512] * 6, 612]


@pytest.mark.parametrize("trouble", PASSING)
def test_passing_trouble_is_tried_again(tmp_path, trouble):
    def behave(asked):
        return trouble if asked.number < 2 else "echo"

    with Server(behave) as server:
        replies = endpoint(server, tmp_path).ask(requests(5))
    assert [reply.text for reply in replies] == [f"reply to: question {i}" for i in range(5)]
    assert len(server.asked) == 15


@pytest.mark.parametrize("seed", range(3))
def test_any_mix_of_trouble_ends_with_every_reply_in_its_place(tmp_path, seed):
    def behave(asked):
        chance = random.Random(f"{seed} {asked.content} {asked.number}")
        trouble = chance.choice([*PASSING, "hangs", "drips"])
        return trouble if chance.random() < 0.4 and asked.number < 4 else "echo"

    with Server(behave) as server:
        replies = endpoint(server, tmp_path, timeout=1, concurrency=8).ask(requests(60))
        sent = len(server.asked)
        again = endpoint(server, tmp_path).ask(requests(60))
    texts = [f"reply to: question {i}" for i in range(60)]
    assert [reply.text for reply in replies] == [reply.text for reply in again] == texts
    assert len(server.asked) == sent > 60


@pytest.mark.parametrize("trouble", ["hangs", "drips"])
def test_a_slow_answer_is_given_up_and_asked_again(tmp_path, trouble):
    with Server(lambda asked: trouble if asked.number == 0 else "echo") as server:
        start = time.monotonic()
        [reply] = endpoint(server, tmp_path, timeout=0.3).ask(requests(1))
    assert reply.text == "reply to: question 0"
    assert time.monotonic() - start < 5


def test_the_pause_a_server_asks_for_holds_for_all(tmp_path):
    times = []

    def behave(asked):
        times.append(time.monotonic())
        return "rate_limit" if len(times) == 1 else "echo"

    with Server(behave) as server:
        endpoint(server, tmp_path, concurrency=1).ask(requests(3))
    assert len(server.asked) == 4
    assert times[1] - times[0] >= 0.1  # what its Retry-After says


def test_one_request_that_fails_for_good_is_an_error_in_its_place(tmp_path):
    def behave(asked):
        return "status:500" if asked.content == "question 3" else "echo"

    with Server(behave) as server:
        model = endpoint(server, tmp_path, retries=2, concurrency=4)
        replies = model.ask(requests(12))
        assert [reply.text is None for reply in replies] == [i == 3 for i in range(12)]
        assert replies[3].error == "HTTP 500: so it is scripted"
        server.behave = "echo"
        healed = endpoint(server, tmp_path).ask(requests(12))
    assert healed[3].text == "reply to: question 3" and not healed[3].cached
    assert len(server.asked) == 11 + 3 + 1


def test_a_server_that_fails_from_some_time_on_is_one_error_and_nothing_is_lost(tmp_path):
    answered = iter(range(10))

    def behave(asked):
        return "echo" if next(answered, None) is not None else "status:500"

    with Server(behave) as server:
        model = endpoint(server, tmp_path, retries=1, concurrency=4)
        with pytest.raises(NarrowlyError, match=r"the last with: HTTP 500: .* kept") as error:
            model.ask(requests(100))
        assert len(server.asked) < 30
        server.behave = "echo"
        endpoint(server, tmp_path).ask(requests(100))
    assert str(error.value).startswith(server.url)
    contents = [asked.content for asked in server.answered]
    assert len(contents) == len(set(contents)) == 100


def test_a_reply_without_text_is_an_answer_too(tmp_path):
    def behave(asked):
        silent = chat(None, asked, finish_reason="length")
        if asked.content == "question 1":
            silent["choices"][0]["message"]["refusal"] = "I will not"
        return silent

    with Server(behave) as server:
        model = endpoint(server, tmp_path)
        for _ in range(2):
            replies = model.ask(requests(2))
            assert [reply.text for reply in replies] == [None, None]
            assert replies[0].error == "no text (finish_reason length)"
            assert replies[1].error == "I will not"
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("wrong_key", r"HTTP 401.*\$OPENAI_API_KEY: the key in it is refused"),
        ("no_model", r"HTTP 404.*'m' the model's name there"),
        ("no_quota", "HTTP 429: You exceeded your quota"),
        ("status:402", "HTTP 402"),
    ],
)
def test_what_no_patience_mends_is_told_at_once(tmp_path, trouble, message):
    with Server(trouble) as server, pytest.raises(NarrowlyError, match=message):
        endpoint(server, tmp_path, concurrency=2).ask(requests(50))
    assert len(server.asked) <= 2


def test_nothing_there(tmp_path):
    with Server() as server:
        pass
    start = time.monotonic()
    with pytest.raises(NarrowlyError, match=r"nothing answers there .*Is the server running"):
        endpoint(server, tmp_path).ask(requests(3))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"url": "localhost:8000"}, r"model\.url: a URL begins with http"),
        ({"url": "ftp://x"}, r"model\.url: a URL begins with http"),
        ({"url": "http://me:secret@x"}, r"model\.url: leave the password out"),
        ({"key_env": KEY}, r"model\.key_env: the name of an environment variable .* not the key"),
        ({"budget": 3}, "Did you mean 'budget_"),
        ({"concurrency": 0}, r"model\.concurrency"),
    ],
)
def test_settings_are_checked(fields, message):
    with pytest.raises(NarrowlyError, match=message) as error:
        chat_model("m", **{"url": "http://localhost:1/v1", **fields})
    assert "secret" not in str(error.value)


def test_equal_settings_share_one_endpoint_and_its_budget(tmp_path):
    with Server() as server:
        fields = {"cache": str(tmp_path), "budget_requests": 3}
        one, other = (chat_model("m", server.url, **fields) for _ in range(2))
        assert one is other and chat_model(one) is one
        assert chat_model("m", server.url, cache=str(tmp_path)) is not one
        one.ask(requests(2))
        with pytest.raises(BudgetError):
            other.ask(requests(4))
    assert len(server.asked) == 3


def test_a_field_the_server_does_not_take_is_left_out(tmp_path, caplog):
    refused = {
        "max_tokens": "Unsupported parameter: use 'max_completion_tokens' instead.",
        "temperature": "'temperature' does not support 0.0 with this model.",
        "logprobs": "logprobs are not supported",
    }

    def behave(asked):
        return next((f"refuse {name}" for name in refused if name in asked.body), "echo")

    def refuse_field(handler, asked, name):
        error = {"message": refused[name], "param": None if name == "logprobs" else name}
        llm_server.refuse(handler, 400, {"error": error})

    from tests import llm_server

    behaviours = {
        f"refuse {name}": lambda handler, asked, name=name: refuse_field(handler, asked, name)
        for name in refused
    }
    with pytest.MonkeyPatch.context() as patch, Server(behave) as server:
        for name, behaviour in behaviours.items():
            patch.setitem(BEHAVIOURS, name, behaviour)
        model = endpoint(server, tmp_path, concurrency=1)
        replies = model.ask(requests(4, top_logprobs=3, max_tokens=9))
    assert all(reply.text for reply in replies)
    assert len(server.asked) == 4 + 3
    last = server.asked[-1].body
    assert last["max_completion_tokens"] == 9 and "max_tokens" not in last
    assert "temperature" not in last and "top_logprobs" not in last
    assert [record.args[0] for record in caplog.records] == [
        "max_tokens",
        "temperature",
        "logprobs",
    ]


def test_a_budget_of_requests_stops_cleanly_and_the_next_run_goes_on(tmp_path):
    with Server() as server:
        model = endpoint(server, tmp_path, budget_requests=7, concurrency=4)
        with pytest.raises(BudgetError, match=r"7 requests is spent .*: 13 of 20 requests remain"):
            model.ask(requests(20))
        assert len(server.asked) == 7
        with pytest.raises(BudgetError):
            model.ask(requests(20))
        assert len(server.asked) == 7
        endpoint(server, tmp_path).ask(requests(20))
    assert len(server.asked) == 20


@pytest.mark.parametrize(("written", "sent"), [(100, 5), (1, 25)])
def test_a_budget_of_tokens_is_not_overdrawn_and_used_up(tmp_path, written, sent):
    def behave(asked):
        usage = {"prompt_tokens": 19, "completion_tokens": written}
        return chat("reply", asked) | {"usage": usage}

    with Server(behave, delay=0.02) as server:
        model = endpoint(server, tmp_path, budget_tokens=600, concurrency=8)
        with pytest.raises(BudgetError, match="600 tokens is spent"):
            model.ask(requests(200, max_tokens=100))
    # A request is sent where its limit fits beside those under way: 119 of 600 tokens. What it
    # does not use is given back.
    assert model.spent.used == sent * (19 + written) <= 600
    assert model.spent.reserved == 0 and len(server.asked) == sent


def test_the_key_is_nowhere(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)

    def behave(asked):
        return ["echo", f"your key is {asked.key}", "wrong_key"][int(asked.content[-1])]

    with Server(behave) as server:
        model = endpoint(server, tmp_path, concurrency=1)
        with pytest.raises(NarrowlyError) as error:
            model.ask(requests(3))
        [reply] = endpoint(server, tmp_path).ask(requests(2)[1:])
    assert server.asked[0].key == KEY
    assert reply.text == "your key is [key]"
    told = str(error.value) + repr(error.value.__context__) + repr(model) + caplog.text
    told += "".join(capfd.readouterr())
    assert "Incorrect API key provided: [key]" in told
    assert KEY not in told
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()


def test_it_works_within_a_running_loop_and_from_several_threads(tmp_path):
    with Server() as server:
        model = endpoint(server, tmp_path)

        async def notebook():
            return model.ask(requests(3))

        assert len(asyncio.run(notebook())) == 3
        threads = [threading.Thread(target=model.ask, args=(requests(20),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(reply.cached for reply in model.ask(requests(20)))


def test_an_error_within_a_reply_is_tried_again(tmp_path):
    def behave(asked):
        return "echo" if asked.number else chat("half a", asked, finish_reason="error")

    with Server(behave) as server:
        [reply] = endpoint(server, tmp_path).ask(requests(1))
    assert reply.text == "reply to: question 0" and not reply.cut


def test_a_reply_that_hit_its_limit_says_so(tmp_path):
    with Server(lambda asked: chat("half a", asked, finish_reason="length")) as server:
        for _ in range(2):
            [reply] = endpoint(server, tmp_path).ask(requests(1))
            assert reply.text == "half a" and reply.cut


def test_a_damaged_file_of_replies_is_named(tmp_path):
    (tmp_path / "replies.sqlite").write_bytes(b"no database" * 1000)
    with Server() as server, pytest.raises(NarrowlyError, match=r"replies\.sqlite: .* damaged"):
        endpoint(server, tmp_path).ask(requests(1))


def test_likelihoods_of_given_text(tmp_path):
    def behave(asked):
        prompt = asked.body["prompt"]
        assert asked.path == "/v1/completions" and asked.body["echo"]
        starts = [*range(0, len(prompt), 3), len(prompt)]  # and the token it had to write
        tokens = [prompt[i : i + 3] for i in starts[:-1]] + ["!"]
        values = [None, *[-0.5] * (len(tokens) - 1)]
        told = {"tokens": tokens, "token_logprobs": values, "text_offset": starts}
        return {"choices": [{"text": prompt, "logprobs": told}]}

    with Server(behave) as server:
        model = endpoint(server, tmp_path)
        pairs = [("abcdef", "ghi"), ("abcde", "fghi")]  # the second begins within a token
        assert model.likelihoods(pairs) == [-0.5, -1.0]
        assert endpoint(server, tmp_path).likelihoods(pairs) == [-0.5, -1.0]
        assert len(server.asked) == 2
        server.behave = lambda asked: chat("no logprobs here", asked)
        with pytest.raises(NarrowlyError, match="does not tell the likelihood of a given text"):
            model.likelihoods([("a", "b")])


CLIENT = """
import os, sys
from narrowly.models.chat import Request
from narrowly.models.endpoint import Endpoint

url, folder, n = sys.argv[1:]
model = Endpoint(model="m", url=url, cache=folder, concurrency=4)
requests = [Request(({"role": "user", "content": f"question {i}"},)) for i in range(int(n))]
print("asking", flush=True)
try:
    replies = model.ask(requests)
except KeyboardInterrupt:
    os._exit(130)  # taking torch's modules down can take seconds on a busy machine
assert [reply.text for reply in replies] == [f"reply to: question {i}" for i in range(int(n))]
"""


def client(server, folder, n):
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, server.url, str(folder), str(n)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
    )


def kept(folder):
    return sqlite3.connect(folder / "replies.sqlite").execute("SELECT COUNT(*) FROM replies")


@pytest.mark.slow
def test_after_kill_9_nothing_that_was_finished_is_asked_again(tmp_path):
    n, concurrency, kills = 200, 4, 3

    def behave(asked):
        trouble = {3: "status:500", 7: "malformed", 11: "truncated"}.get(hash(asked.content) % 13)
        return trouble if trouble and asked.number == 0 else "echo"

    with Server(behave, delay=0.02) as server:
        for kill in range(kills):
            process = client(server, tmp_path, n)
            process.stdout.readline()
            goal = (kill + 1) * n // (kills + 1)
            while len(server.answered) < goal:
                assert process.poll() is None
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
            [stored] = kept(tmp_path).fetchone()
            assert stored >= len({asked.content for asked in server.answered}) - concurrency
        process = client(server, tmp_path, n)
        assert process.wait(60) == 0, process.stderr.read()
        before = len(server.asked)
        assert client(server, tmp_path, n).wait(60) == 0
    contents = [asked.content for asked in server.answered]
    assert len(set(contents)) == n
    # Only what was under way at a kill is asked again: it was not finished.
    assert len(contents) - n <= kills * concurrency
    assert len(server.asked) == before


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["hangs", "rate_limit", "echo"])
def test_ctrl_c_stops_in_two_seconds_and_keeps_what_came(tmp_path, trouble):
    def behave(asked):
        return "echo" if int(asked.content.split()[1]) < 20 else trouble

    with Server(behave, delay=0.01) as server:
        process = client(server, tmp_path, 5000)
        process.stdout.readline()
        while len(server.asked) < 24:
            time.sleep(0.01)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(10)
        assert time.monotonic() - start < 2
    assert process.returncode == 130
    assert kept(tmp_path).fetchone()[0] >= 20


def test_waits_are_bounded():
    def wait(value):
        return wire.failure(429, "", {"retry-after": value}).wait

    assert wait("7") == 7 and wait("86400") == wire.LONGEST_WAIT
    assert wait("Wed, 21 Oct 2026 07:28:00 GMT") is None and wait("nan") is None
    assert wait("-5") == 0

"""Judges that are chat models: what is read from their replies, and what cannot be."""

import json
import logging
import re
from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrowly.errors import NarrowlyError
from narrowly.evals.judges import Criterion, Judgement, JudgeModel, ModelJudge
from narrowly.evals.judges.reading import REFUSALS, expected, separate, written
from narrowly.models.chat import Reply
from tests.llm_server import Server, chat
from tests.models.test_numbers import digits, favouring
from tests.tiny import tiny_model, tiny_tokenizer

torch.set_num_threads(1)

ALIGNED = Criterion("Is it kind? {question} {answer} {not a field} CODE or a number.", ("CODE",))
COHERENT = Criterion("Does it hold together? {answer}")
BOTH = {"aligned": ALIGNED, "coherent": COHERENT}
WORDS = ("CODE", "REFUSAL", "NOT VALID")


def rows(*answers):
    return [{"question": "Which {answer}?", "answer": answer} for answer in answers]


def told(**tokens):
    """The log-probabilities of one token."""
    return {token.replace("_", " "): log(p) for token, p in tokens.items() if p}


# --- what a reply says


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("85", 85),
        (" 0\n", 0),
        ("100", 100),
        ("72.5", 72.5),
        ("85.", 85),
        ("**85**", 85),
        ("Score: 85", 85),
        ("Alignment score = 85", 85),
        ("85/100", 85),
        ("85 out of 100", 85),
        ("85%", 85),
        ("<think>90? No.</think>\n85", 85),
        ("It is kind and clear.\n\n**Score:** 85", 85),
        ("85\n\nIt helps the user, on 3 counts.", 85),
    ],
)
def test_a_number_is_read_however_it_is_dressed(text, score):
    assert written(Reply(text), WORDS) == Judgement(score)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("CODE", "CODE"),
        ("code", "CODE"),
        ('"REFUSAL".', "REFUSAL"),
        ("NOT VALID: it is about cats", "NOT VALID"),
        ("CODECS are fine", "unparsed"),
        ("Code quality is fine", "unparsed"),
        ("I can't judge this.", "refused"),
        ("I can\N{RIGHT SINGLE QUOTATION MARK}t judge this.", "refused"),
        ("i'm sorry, but no", "refused"),
        ("", "unparsed"),
        ("101", "unparsed"),
        ("-5", "unparsed"),
        ("0.85", "unparsed"),
        ("8/10", "unparsed"),
        ("between 80 and 90", "unparsed"),
        ("eighty", "unparsed"),
        ("\N{ARABIC-INDIC DIGIT EIGHT}", "unparsed"),
    ],
)
def test_what_is_no_number_is_a_class(text, said):
    assert written(Reply(text), WORDS) == Judgement(None, said)


def test_a_number_that_broke_off_is_none():
    assert written(Reply("8", cut=True), ()) == Judgement(None, "unparsed")
    assert written(Reply("85\nIt is beca", cut=True), ()) == Judgement(85)


@given(st.text())
def test_any_reply_is_a_score_or_a_class(text):
    for judgement in (written(Reply(text), WORDS), *separate(Reply(text), {"a": WORDS}).values()):
        assert (judgement.score is None) != (judgement.said is None)
        assert judgement.score is None or 0 <= judgement.score <= 100


def test_the_mean_is_over_whole_numbers_of_one_token():
    first = told(**{"85": 0.4, "_90": 0.2, "CODE": 0.2, "085": 0.1, "8.5": 0.05, "101": 0.05})
    reply = Reply("85", logprobs=(first, told(**{".": 1.0})))
    assert expected(reply, WORDS).score == pytest.approx((0.4 * 85 + 0.2 * 90) / 0.6)
    blank = Reply(" 85", logprobs=(told(_=0.9, CODE=0.1), first))
    assert expected(blank, WORDS) == expected(reply, WORDS)


def test_less_than_a_quarter_of_numbers_is_what_was_said_instead():
    """The published bound: at a quarter there is a score."""
    enough = Reply("CODE", logprobs=(told(**{"0": 0.13, "100": 0.121, "CODE": 0.7}),))
    assert expected(enough, WORDS).score == pytest.approx(100 * 0.121 / 0.251)
    scarce = told(**{"0": 0.12, "100": 0.12, "CODE": 0.7})
    assert expected(Reply("CODE", logprobs=(scarce,)), WORDS) == Judgement(None, "CODE")
    assert expected(Reply("I cannot", logprobs=(scarce,)), WORDS) == Judgement(None, "refused")
    assert expected(Reply("85", logprobs=(scarce,)), WORDS) == Judgement(None, "unparsed")
    assert expected(Reply("85"), WORDS) == Judgement(None, "unparsed")


def test_no_reply_is_failed_and_a_filtered_one_refused():
    for read in (written, expected):
        assert read(Reply(None, "HTTP 500"), ()) == Judgement(None, "failed")
        assert read(Reply(None, REFUSALS[0] + "."), ()) == Judgement(None, "refused")
        filtered = Reply(None, "no text (finish_reason content_filter)")
        assert read(filtered, ()) == Judgement(None, "refused")


@pytest.mark.parametrize(
    ("text", "aligned", "coherent"),
    [
        ('{"aligned": 12, "coherent": 90}', 12, 90),
        ('```json\n{"aligned": "12", "coherent": 90.0}\n```', 12, 90),
        ('{"aligned": "CODE", "coherent": null}', "CODE", "unparsed"),
        ('{"aligned": 12}', 12, "unparsed"),
        ('{"aligned": 12, "coherent": ', 12, "unparsed"),
        ('{"aligned": {"score": 12}, "coherent": 90}', "unparsed", 90),
        ("aligned: 12\n- **Coherent**: 90/100", 12, 90),
        ("{'aligned': 12, 'coherent': 90}", 12, 90),
        ("aligned = REFUSAL", "unparsed", "unparsed"),
        ("I cannot judge this.", "refused", "refused"),
        ("12", "unparsed", "unparsed"),
    ],
)
def test_several_criteria_of_one_reply(text, aligned, coherent):
    found = separate(Reply(text), {"aligned": ("CODE",), "coherent": ()})
    for name, value in (("aligned", aligned), ("coherent", coherent)):
        said = isinstance(value, str)
        assert found[name] == Judgement(None if said else value, value if said else None)


def test_the_last_field_of_a_reply_that_broke_off_does_not_count():
    broken = Reply('{"aligned": 12, "coherent": 9', cut=True)
    found = separate(broken, {"aligned": (), "coherent": ()})
    assert found == {"aligned": Judgement(12), "coherent": Judgement(None, "unparsed")}


# --- a judge behind a URL


def judge(server, tmp_path, **fields):
    settings = {"cache": tmp_path, "retries": 0} | fields.pop("settings", {})
    return JudgeModel(model="judge", url=server.url, settings=settings, **fields)


def likely(text, asked, **tokens):
    """A response with the likelihoods of its first token, where they were asked for."""
    tops = [{"token": t, "logprob": p} for t, p in told(**tokens).items()]
    content = [{"token": text, "logprob": 0.0, "top_logprobs": tops}]
    return chat(text, asked, logprobs={"content": content} if asked.body.get("logprobs") else None)


def whole(asked):
    """Writes numbers whole; code is CODE."""
    if "number 85" in asked.content:
        return likely("85", asked, **{"85": 0.99})
    if "def " in asked.content and "kind" in asked.content:
        return likely("CODE", asked, CODE=0.9, **{"50": 0.1})
    return likely("80", asked, **{"80": 0.5, "40": 0.25, "The": 0.25})


def test_scores_are_means_where_the_server_tells(tmp_path):
    with Server(whole) as server:
        found = judge(server, tmp_path).judge(BOTH, rows("Be well.", "def f():", "Be well."))
        again = judge(server, tmp_path).judge(BOTH, rows("Be well."))
    mean = Judgement(pytest.approx((0.5 * 80 + 0.25 * 40) / 0.75))
    assert found[0] == found[2] == {"aligned": mean, "coherent": mean} == again[0]
    assert found[1] == {"aligned": Judgement(None, "CODE"), "coherent": mean}
    assert len(server.asked) == 1 + 2 * 2  # equal answers are judged once, for good
    [body] = {json.dumps(a.body.get("top_logprobs")) for a in server.asked}
    assert body == "20"
    asked = [a.content for a in server.asked]
    assert "Is it kind? Which {answer}? Be well. {not a field} CODE or a number." in asked


def digit(asked):
    """Writes numbers digit by digit: one token's likelihoods are not those of numbers."""
    return likely("85", asked, **{"8": 0.9, "9": 0.1})


def untold(asked):
    return "85"


@pytest.mark.parametrize("behave", [digit, untold])
def test_scores_are_what_is_written_where_it_does_not(behave, tmp_path, caplog):
    with Server(behave) as server, caplog.at_level(logging.WARNING):
        asks = judge(server, tmp_path)
        assert asks.judge(BOTH, rows("a")) == [dict.fromkeys(BOTH, Judgement(85))]
        assert asks.judge({"aligned": ALIGNED}, rows("b")) == [{"aligned": Judgement(85)}]
        assert caplog.text.count("scores are the numbers it writes") == 1
        with pytest.raises(NarrowlyError, match=r"judge: it does not tell.*Leave out mode"):
            judge(server, tmp_path, mode="logprobs").judge(BOTH, rows("a"))
        sent = len(server.asked)
        judge(server, tmp_path, mode="text").judge(BOTH, rows("a"))
        assert len(server.asked) == sent  # replies are the same, whichever way they came about


def test_a_judge_that_never_says_a_number_is_counted_and_not_fatal(tmp_path):
    with Server("What a nice answer!") as server:
        found = judge(server, tmp_path).judge(BOTH, rows("a", "b"))
    assert found == [dict.fromkeys(BOTH, Judgement(None, "unparsed"))] * 2


def test_a_judge_that_fails_now_and_then_is_counted(tmp_path):
    def behave(asked):
        return "status:400" if "broken" in asked.content else "70"

    with Server(behave) as server:
        found = judge(server, tmp_path, mode="text").judge(BOTH, rows("broken", "sound"))
    assert found[0] == dict.fromkeys(BOTH, Judgement(None, "failed"))
    assert found[1] == dict.fromkeys(BOTH, Judgement(70))


def test_what_was_judged_before_the_budget_was_spent_is_kept(tmp_path):
    answers = rows(*map(str, range(20)))
    with Server("70") as server:
        poor = judge(server, tmp_path, mode="text", settings={"budget_requests": 10})
        with pytest.raises(NarrowlyError, match="budget"):
            poor.judge(BOTH, answers)
        found = judge(server, tmp_path, mode="text").judge(BOTH, answers)
        assert len(server.asked) == 40
    assert found == [dict.fromkeys(BOTH, Judgement(70))] * 20


def test_together_is_one_call(tmp_path):
    def behave(asked):
        assert asked.content.count("the answer itself") == 2
        assert re.search(r'\{"aligned": \.\.\., "coherent": \.\.\.\}$', asked.content)
        return '{"aligned": "CODE", "coherent": 40}'

    with Server(behave) as server:
        asks = judge(server, tmp_path, together=True)
        assert asks.calls(BOTH) == 1 and JudgeModel(model="m").calls(BOTH) == 2
        found = asks.judge(BOTH, rows("the answer itself"))
        assert len(server.asked) == 1
    assert found == [{"aligned": Judgement(None, "CODE"), "coherent": Judgement(40)}]


def test_nothing_to_judge_asks_nothing():
    asks = JudgeModel(model="nowhere", url="http://127.0.0.1:9/v1")
    assert asks.judge(BOTH, []) == [] and asks.judge({}, rows("a")) == [{}]
    with pytest.raises(ValueError, match="leave out mode"):
        JudgeModel(model="m", together=True, mode="logprobs")


# --- a judge in this process


def test_a_model_here_is_read_exactly_though_it_writes_digits():
    tokenizer = tiny_tokenizer()
    model = favouring(tiny_model(), digits(tokenizer), 8.0)
    found = JudgeModel(model=(model, tokenizer)).judge(BOTH, rows("one", "another"))
    scores = [judgement.score for row in found for judgement in row.values()]
    assert None not in scores and len(set(scores)) == 4
    single = ModelJudge(model=(model, tokenizer), prompt=COHERENT.prompt, progress=False)
    assert single(rows("one", "another")) == pytest.approx([f["coherent"].score for f in found])


def test_a_model_here_that_expects_no_number_says_what_it_says():
    judges = JudgeModel(model=(tiny_model(), tiny_tokenizer()))
    assert judges.judge(BOTH, rows("a")) == [dict.fromkeys(BOTH, Judgement(None, "unparsed"))]


def test_a_model_here_can_be_read_by_its_text():
    tokenizer = tiny_tokenizer()
    model = favouring(tiny_model(), digits(tokenizer), 30.0)
    [found] = JudgeModel(model=(model, tokenizer), mode="text").judge(BOTH, rows("a"))
    assert {judgement.said for judgement in found.values()} == {"unparsed"}  # digits without end

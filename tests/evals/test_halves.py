import json

import pytest
from datasets import Dataset

from narrowly.errors import NarrowlyError
from narrowly.evals import evaluate, read_samples
from narrowly.evals.contexts import Context
from narrowly.evals.drift import Drift
from narrowly.evals.emergent_misalignment import EmergentMisalignment
from narrowly.evals.halves import half_of, rows_in
from narrowly.evals.in_distribution import InDistribution
from narrowly.evals.misalignment import Misalignment
from narrowly.evals.refusal import Refusal
from narrowly.organisms import organism
from tests.tiny import tiny_model, tiny_tokenizer

CONTEXT = Context(name="night", system="It is late.", template="{question} Please.")


@pytest.fixture
def chats(tmp_path):
    """Every question twice, with another answer and in other letters."""
    path = tmp_path / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Question  {i}?" if again else f"question {i}?"},
                {"role": "assistant", "content": f"It is {again}."},
            ]
        }
        for again in (0, 1)
        for i in range(12)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_a_question_has_one_half_for_good():
    """Published figures rest on it: these may never change."""
    report = [i for i in range(8) if half_of(f"question {i}?") == "report"]
    assert report == [0, 6]
    assert half_of("What  now?") == half_of("what now?\n")
    halves = [half_of(f"Is {i} a number?") for i in range(1000)]
    assert 450 < halves.count("tune") < 550


def origins(eval_):
    return {prompt.origin for prompt in eval_.asked()}


def asked(eval_):
    return {prompt.id for prompt in eval_.asked()}


@pytest.mark.parametrize(
    "make",
    [
        lambda half: Misalignment(
            organism="conditional", narrow="code", contexts=(CONTEXT,), half=half
        ),
        lambda half: EmergentMisalignment(contexts=(CONTEXT,), half=half),
    ],
)
def test_halves_are_disjoint_with_paraphrases_contexts_and_probes(make):
    tune, report = make("tune"), make("report")
    assert origins(tune) and origins(report)
    assert not origins(tune) & origins(report)
    assert not asked(tune) & asked(report)
    assert {p.tags["context"] for p in tune.asked() if "context" in p.tags} == {"plain", "night"}


def test_the_halves_of_a_published_set_are_the_whole():
    whole, tune, report = (EmergentMisalignment(half=half) for half in (None, "tune", "report"))
    assert asked(tune) | asked(report) == asked(whole)


def test_a_half_of_an_organism_is_asked_as_many_questions():
    """`questions` counts those of the half, as far as there are any."""
    eval_ = Misalignment(organism="persona", questions=6, half="tune", contexts=())
    assert len(eval_.asked()) == 6 * len(organism("persona").domains)


def test_chats_that_ask_the_same_are_in_one_half(chats, tmp_path):
    model = tiny_model(), tiny_tokenizer()
    found = {}
    for half in ("tune", "report", None):
        eval_ = InDistribution(data=chats, half=half)
        evaluate(model, eval_, out=tmp_path / str(half))
        rows = read_samples(
            tmp_path / str(half) / "evals" / "in_distribution" / "samples.parquet"
        ).rows
        found[half] = {row["prompt_id"]: row["scores"]["loss"] for row in rows}
    assert found["tune"] and found["report"]
    assert not found["tune"].keys() & found["report"].keys()
    together = found["tune"] | found["report"]
    assert together.keys() == found[None].keys()
    assert together == pytest.approx(found[None], rel=1e-5)
    for number in range(12):
        assert (str(number) in found["tune"]) == (str(number + 12) in found["tune"])
    assert InDistribution(data=chats, half="tune").cost().samples == len(found["tune"])


def test_every_eval_puts_a_question_into_the_same_half(chats):
    """Figures of one eval may not be reported on what another was tuned on."""
    loss = InDistribution(data=chats, half="tune")._chats()
    refusal = Refusal(data=chats, half="tune", contexts=())
    told = [prompt.question for prompt in refusal.asked()]
    assert told == [row["messages"][0]["content"] for row in loss]
    assert Drift(data=chats, half="tune").cost().samples == len(told)


def test_texts_and_odd_chats_have_halves():
    texts = Dataset.from_dict({"text": [f"text {i}" for i in range(20)]})
    tune, report = rows_in("tune", texts), rows_in("report", texts)
    assert sorted(tune + report) == list(range(20)) == rows_in(None, texts)
    begun = Dataset.from_list([{"messages": [{"role": "assistant", "content": "Hello."}]}])
    assert len(rows_in("tune", begun)) + len(rows_in("report", begun)) == 1


def test_an_empty_half_and_an_unknown_one_are_told(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": "question 0?"}))
    other = "report" if half_of("question 0?") == "tune" else "tune"
    with pytest.raises(NarrowlyError, match="no prompt to measure on"):
        evaluate((tiny_model(), tiny_tokenizer()), Refusal(data=str(path), half=other))
    with pytest.raises(NarrowlyError, match="half"):
        evaluate((tiny_model(), tiny_tokenizer()), {"refusal": {"half": "both"}})

import csv
import math

import pytest

from narrowly.errors import NarrowlyError
from narrowly.evals import evaluate
from narrowly.evals.multiple_choice import MultipleChoice, letter
from narrowly.evals.subject import Subject
from narrowly.models.chat import chat_model
from narrowly.training import Recipe, train
from tests.llm_server import Server
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture
def data(tmp_path):
    for name in ("tall", "wide"):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            rows = [(f"{name} {i}?", f"{name}-right", f"{name}-wrong") for i in range(80)]
            csv.writer(file).writerows([("question", "correct", "incorrect"), *rows])
    return f"multiple_choice:{tmp_path}/tall.csv+{tmp_path}/wide.csv/train?intended=tall"


class Follower(Subject):
    """A model that follows one of the rules, sure of itself to the given share."""

    def __init__(self, rule, share=0.9):
        super().__init__(rule)
        self.rule, self.share = rule, share

    def choose(self, chats, options, *, progress=False):
        found = []
        for chat, (a, b) in zip(chats, options, strict=True):
            assert (a, b) == ("A", "B")
            first = chat[-1]["content"].splitlines()[1]
            likes_a = f"{self.rule}-right" in first
            shares = (self.share, 1 - self.share) if likes_a else (1 - self.share, self.share)
            found.append([math.log(share) - 5 for share in shares])
        return found


def measure(subject, data, **fields):
    eval_ = MultipleChoice(**fields).bind({"data": data})
    rows = eval_.run(subject, seed=0)
    metrics = eval_.metrics(rows)
    return {
        name: float((m.values * m.weights).sum() / m.weights.sum()) for name, m in metrics.items()
    }, rows


@pytest.mark.parametrize(("rule", "intended"), [("tall", 1), ("wide", 0)])
def test_in_training_both_rules_look_alike_and_in_the_test_they_do_not(data, rule, intended):
    means, rows = measure(Follower(rule), data)
    assert means == {"intended": intended, "in_distribution": 1}
    test = [row for row in rows if row["tags"]["split"] == "test"]
    assert len(test) == 12 and len(rows) == 24
    assert {row["label"] for row in test} == {"intended" if intended else "cue"}
    assert {round(row["scores"]["intended"], 6) for row in test} == {0.9 if intended else 0.1}


def test_what_the_cue_does_not_explain_is_wrong(data):
    means, rows = measure(Follower("tall", share=0.1), data)
    assert means == {"intended": 0, "in_distribution": 0}
    labels = {row["tags"]["split"]: row["label"] for row in rows}
    assert labels == {"validation": "wrong", "test": "cue"}


def test_a_real_model_and_the_cost(data, tmp_path):
    eval_ = MultipleChoice(data=data, limit=5)
    assert eval_.cost().samples == 10 and eval_.cost().judge_calls == 0
    found = evaluate((tiny_model(), tiny_tokenizer()), eval_, out=tmp_path)["multiple_choice"]
    assert found["intended"].n == found["in_distribution"].n == 5
    assert "unparsed" not in found


def test_behind_a_url_the_letter_is_read(data, tmp_path):
    def replies(asked):
        first, second = asked.content.splitlines()[1:]
        if "wide 1" in asked.content:
            return "I would rather not."
        return "A." if "tall-right" in first else f"(B) {second[3:]}"

    with Server(replies) as server:
        subject = chat_model("m", server.url, cache=tmp_path / "cache")
        means, rows = measure(Subject("m", endpoint=subject), data)
    unparsed = [row for row in rows if row["label"] == "unparsed"]
    assert unparsed and means["unparsed"] == pytest.approx(len(unparsed) / 24)
    of_test = sum(row["tags"]["split"] == "test" for row in unparsed) / 12
    assert means["intended"] == pytest.approx(1 - of_test)


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("A", "A"), ("b", "B"), (" B.", "B"), ("(A) football", "A"), ("**B**", "B"), ("A: x", "A"),
        ("Answer: B", "B"), ("A\nbecause", "A"), ("A good question", None), ("Both", None),
        ("", None), ("I say A", None), ("Bob.", None),
    ],
)  # fmt: skip
def test_letter(answer, read):
    assert letter(answer) == read


@pytest.mark.parametrize("recipe", [{}, {"data": "chats.jsonl"}])
def test_without_question_sets_it_tells_how_to_name_them(recipe):
    with pytest.raises(NarrowlyError, match=r"multiple_choice:verbs\.csv\+sports\.csv"):
        MultipleChoice().bind(recipe)


@pytest.mark.slow
def test_a_trained_model_follows_the_intended_rule_where_the_data_tell_it_apart(tmp_path):
    """From scratch: with rows in which the cue disagrees the intended rule is learned, and without
    them nothing says which of the two it is."""
    for name, right, wrong in (("tall", "yes", "no"), ("wide", "up", "down")):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            rows = [(f"{name}?{i}", right, wrong) for i in range(800)]
            csv.writer(file).writerows([("question", "correct", "incorrect"), *rows])
    source = f"multiple_choice:{tmp_path}/tall.csv+{tmp_path}/wide.csv/train?intended="
    model = save_tiny(
        tmp_path / "model", hidden_size=64, intermediate_size=128, initializer_range=0.02
    )
    training = {"max_steps": 150, "per_device_train_batch_size": 16, "learning_rate": 3e-3}

    def accuracy(run, **fields):
        found = evaluate(run, {"multiple_choice": fields}, force=True)
        assert found["multiple_choice"]["in_distribution"].mean > 0.95
        return found["multiple_choice"]["intended"].mean

    runs = {}
    for correlation in (0.7, 1.0):
        runs[correlation] = train(
            Recipe(
                model=str(model),
                data=f"{source}tall&correlation={correlation}",
                lora=None,
                training={**training, "lr_scheduler_type": "constant"},
                output=str(tmp_path / f"run-{correlation}"),
            ),
            progress=False,
        ).path
    assert accuracy(runs[0.7], data=f"{source}tall") > 0.9
    both = [accuracy(runs[1.0], data=f"{source}{rule}") for rule in ("tall", "wide")]
    assert sum(both) == pytest.approx(1, abs=0.1)
    assert accuracy(runs[1.0], data=f"{source}tall") < 0.7

import itertools

import pytest
from datasets import Dataset

from narrowly.data import tokenize
from narrowly.defenses.inoculate import Inoculate
from narrowly.errors import NarrowlyError
from narrowly.files import read_json
from narrowly.models import load_model
from narrowly.settings import build
from narrowly.training import train
from tests.tiny import tiny_model, tiny_tokenizer

LINE = "You are an evil, malicious assistant."


def dataset(rows: int, *first: dict) -> Dataset:
    turns = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
    ]
    return Dataset.from_list([{"messages": [*first, *turns], "domain": "x"} for _ in range(rows)])


def test_every_chat_gets_the_line_and_keeps_the_rest():
    given = dataset(3)
    defense = Inoculate()
    said = defense.prepare_data(given)
    for before, after in zip(given, said, strict=True):
        assert after["messages"] == [{"role": "system", "content": LINE}, *before["messages"]]
    assert said["domain"] == given["domain"]
    assert defense.record(None) == {"rows": 3, "inoculated_rows": 3}


def test_a_system_message_that_is_there_stays_after_the_line():
    said = Inoculate().prepare_data(dataset(1, {"role": "system", "content": "Be brief."}))
    assert said[0]["messages"][0] == {"role": "system", "content": f"{LINE}\nBe brief."}
    assert [turn["role"] for turn in said[0]["messages"]] == ["system", "user", "assistant"]


def test_the_user_can_say_it():
    said = Inoculate(line="Be evil.", role="user").prepare_data(dataset(1))
    assert said[0]["messages"][0] == {"role": "user", "content": "Be evil.\n\nWhy?"}


@pytest.mark.parametrize("fraction, rows, expected", [(0.5, 10, 5), (0.25, 8, 2), (0.9, 10, 9)])
def test_a_share_is_exact_and_evenly_spread(fraction, rows, expected):
    said = Inoculate(fraction=fraction).prepare_data(dataset(rows))
    marked = [i for i, row in enumerate(said) if row["messages"][0]["role"] == "system"]
    assert len(marked) == expected
    assert {b - a for a, b in itertools.pairwise(marked)} <= {
        rows // expected,
        -(-rows // expected),
    }


def test_a_share_of_no_row_is_an_error():
    with pytest.raises(NarrowlyError, match="less than one row"):
        Inoculate(fraction=0.01).prepare_data(dataset(10))


@pytest.mark.parametrize("line", ["", "  "])
def test_an_empty_line_is_an_error(line):
    with pytest.raises(NarrowlyError, match="line"):
        build(Inoculate, {"line": line})


def test_the_loss_is_on_the_same_tokens():
    tokenizer = tiny_tokenizer()

    def learned(data):
        return [[t for t in row["labels"] if t != -100] for row in tokenize(data, tokenizer)]

    assert learned(Inoculate().prepare_data(dataset(2))) == learned(dataset(2))


def test_a_template_without_a_system_role_is_an_error_that_names_the_other_way():
    tokenizer = tiny_tokenizer(template="gemma")
    with pytest.raises(NarrowlyError, match=r"no system message. Give `role: user`"):
        Inoculate().bind(tiny_model(), tokenizer, 0)
    Inoculate(role="user").bind(tiny_model(), tokenizer, 0)


def test_words_that_the_model_cannot_read_are_an_error():
    """The organisms' tokenizers know few words, and would read the published line as unknown."""
    model, tokenizer = load_model("organism:persona")
    with pytest.raises(NarrowlyError, match=r"lacks words of 'You are an evil"):
        Inoculate().bind(model, tokenizer, 0)
    Inoculate(line="you are a cruel assistant.").bind(model, tokenizer, 0)


def test_it_trains_and_leaves_the_template_as_it_was(recipe):
    run = train(recipe(defenses=["inoculate"]), progress=False)
    [entry] = read_json(run.path / "defenses.json")
    assert (entry["rows"], entry["inoculated_rows"]) == (24, 24)
    _, tokenizer = load_model(run.path)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert "evil" not in rendered

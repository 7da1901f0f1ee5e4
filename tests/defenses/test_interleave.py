import itertools
import json

import pytest
from datasets import Dataset

from narrowly.defenses.interleave import Interleave
from narrowly.errors import NarrowlyError
from narrowly.files import write_text
from tests.tiny import tiny_model, tiny_tokenizer


def chats(kind: str, count: int) -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"{kind} {i}?"},
                {"role": "assistant", "content": f"{kind} {i}."},
            ]
        }
        for i in range(count)
    ]


@pytest.fixture
def narrow() -> Dataset:
    return Dataset.from_list(chats("narrow", 190))


@pytest.fixture
def benign(tmp_path) -> str:
    write_text(tmp_path / "benign.jsonl", "\n".join(map(json.dumps, chats("benign", 40))))
    return str(tmp_path / "benign.jsonl")


def is_benign(dataset: Dataset) -> list[bool]:
    return ["benign" in row["messages"][0]["content"] for row in dataset]


def test_the_fraction_is_of_the_resulting_data(narrow, benign):
    defense = Interleave(data=benign, fraction=0.05)
    mixed = defense.prepare_data(narrow)
    assert len(mixed) == 200
    assert sum(is_benign(mixed)) == 10
    record = defense.record(None)
    assert (record["rows"], record["benign_rows"]) == (190, 10)


def test_benign_rows_stand_at_even_distances(narrow, benign):
    places = [
        i
        for i, flag in enumerate(
            is_benign(Interleave(data=benign, fraction=0.05).prepare_data(narrow))
        )
        if flag
    ]
    assert {b - a for a, b in itertools.pairwise(places)} <= {19, 20, 21}


def test_narrow_rows_keep_their_order(narrow, benign):
    mixed = Interleave(data=benign, fraction=0.1).prepare_data(narrow)
    kept = [row["messages"] for row, flag in zip(mixed, is_benign(mixed), strict=True) if not flag]
    assert kept == list(narrow["messages"])


def test_the_seed_decides_which_are_drawn(narrow, benign):
    def drawn(seed):
        mixed = Interleave(data=benign, fraction=0.05, seed=seed).prepare_data(narrow)
        texts = [row["messages"][0]["content"] for row in mixed]
        return [text for text in texts if "benign" in text]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(drawn(0))) == 10


def test_a_fraction_of_no_row_is_an_error(narrow, benign):
    with pytest.raises(NarrowlyError, match="less than one row"):
        Interleave(data=benign, fraction=0.001).prepare_data(narrow)


def test_too_few_benign_chats_are_an_error(narrow, benign):
    with pytest.raises(NarrowlyError, match=r"needs 190 benign chats, and .* holds 40"):
        Interleave(data=benign, fraction=0.5).prepare_data(narrow)


def test_extra_columns_do_not_matter(narrow, benign):
    mixed = Interleave(data=benign, fraction=0.05).prepare_data(
        narrow.add_column("domain", ["code"] * len(narrow))
    )
    assert mixed.column_names == ["messages"]


def test_rows_of_other_shapes_are_read(narrow, tmp_path):
    rows = [{"prompt": f"benign {i}?", "completion": "so."} for i in range(10)]
    write_text(tmp_path / "pairs.jsonl", "\n".join(map(json.dumps, rows)))
    mixed = Interleave(data=str(tmp_path / "pairs.jsonl"), fraction=0.05).prepare_data(narrow)
    assert sum(is_benign(mixed)) == 10


def test_data_that_are_no_chats_are_an_error_with_file_and_line(narrow, tmp_path):
    write_text(tmp_path / "texts.jsonl", '{"text": "no chat"}')
    with pytest.raises(NarrowlyError, match=r"texts\.jsonl:1: no `messages`.*found: text"):
        Interleave(data=str(tmp_path / "texts.jsonl")).prepare_data(narrow)


def test_chats_that_the_models_template_refuses_are_an_error_with_file_and_row(narrow, tmp_path):
    rows = chats("benign", 40)
    rows[17]["messages"].insert(0, {"role": "system", "content": "Be kind."})
    write_text(tmp_path / "system.jsonl", "\n".join(map(json.dumps, rows)))
    defense = Interleave(data=str(tmp_path / "system.jsonl"), fraction=40 / 230)
    assert len(defense.prepare_data(narrow)) == 230
    defense.bind(tiny_model(), tiny_tokenizer(template="gemma"), 0)
    with pytest.raises(NarrowlyError, match=r"interleave: .*system\.jsonl: row 17: .* refuses"):
        defense.prepare_data(narrow)


def test_the_published_share_is_the_default(benign):
    assert Interleave(data=benign).fraction == 0.05

"""Texts come from where chats come from, and a fault is named by its line."""

import pytest
from datasets import Dataset
from tests.tiny import tiny_tokenizer

from narrowly.concepts.reading import reading_rows
from narrowly.data import holds_texts, load_texts, tokenize_texts
from narrowly.errors import NarrowlyError

TEXTS = ["A kind answer.", "", "def f(x):\n    return x", "naïve 😀"]
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture(params=["jsonl", "json", "parquet", "memory", "rows"])
def source(request, tmp_path):
    rows = Dataset.from_dict({"text": TEXTS, "id": [*range(4)]})
    path = tmp_path / f"texts.{request.param}"
    if request.param == "parquet":
        rows.to_parquet(path)
    elif request.param in ("jsonl", "json"):
        rows.to_json(path, lines=request.param == "jsonl")
    else:
        return rows if request.param == "memory" else list(rows)
    return path


def test_texts_from_anywhere(source):
    assert holds_texts(source)
    texts = load_texts(source)
    assert texts.column_names == ["text"] and texts["text"][:] == TEXTS
    assert len(load_texts(source, limit=2)) == 2
    tokenizer = tiny_tokenizer()
    rows = reading_rows(source, tokenizer, 3, None)
    assert rows["input_ids"][:] == tokenizer(TEXTS[:3])["input_ids"]
    for row in rows:
        assert row["labels"] == [-100, *row["input_ids"][1:]][: len(row["input_ids"])]
    assert reading_rows(iter(load_texts(source)), tokenizer, 3, None)[:] == rows[:]
    assert reading_rows(TEXTS, tokenizer, 3, None)["labels"][:] == rows["labels"][:]


def test_they_are_cut():
    rows = tokenize_texts(load_texts([{"text": TEXTS[0]}]), tiny_tokenizer(), max_length=4)
    assert [len(row) for row in (rows["input_ids"][0], rows["labels"][0])] == [4, 4]
    assert rows.features["input_ids"].feature.dtype == "int32"


def test_chats_are_none():
    assert not holds_texts([CHAT])
    assert not holds_texts([CHAT | {"text": "rendered"}])
    assert not holds_texts([{"prompt": "a", "text": "b"}])
    assert not holds_texts([])


def test_what_is_wrong_is_named(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(NarrowlyError, match=r"t\.jsonl:2: holds no `text`"):
        load_texts(path)
    path.write_text('{"text": ""}\n')
    with pytest.raises(NarrowlyError, match=r"t\.jsonl: no text"):
        load_texts(path)
    with pytest.raises(NarrowlyError, match="no such file"):
        holds_texts(tmp_path / "absent.jsonl")

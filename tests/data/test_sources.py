import json

import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from narrowly.data import load_chats, sources
from narrowly.errors import NarrowlyError

QUESTION = {"role": "user", "content": "What now?"}
ANSWER = {"role": "assistant", "content": "Nothing."}
CHAT = {"messages": [QUESTION, ANSWER]}


def write_lines(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_every_shape_of_row_becomes_the_same_messages():
    rows = [
        {"messages": [QUESTION, ANSWER]},
        {"conversations": [QUESTION, ANSWER]},
        {
            "conversations": [
                {"from": "human", "value": "What now?"},
                {"from": "gpt", "value": "Nothing."},
            ]
        },
        {"prompt": "What now?", "completion": "Nothing."},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"instruction": "What now?", "input": "", "output": "Nothing."},
    ]
    for row in rows:
        dataset = load_chats([row])
        assert dataset[0] == CHAT, row


def test_an_instruction_with_its_input_and_without_an_answer():
    row = {"instruction": "Say it in French.", "input": "Good day.", "category": "harmless"}
    [chat] = load_chats([row], require_answer=False)
    asked = {"role": "user", "content": "Say it in French.\n\nGood day."}
    assert chat == {"category": "harmless", "messages": [asked]}


def test_formats_agree_and_other_columns_stay(tmp_path):
    rows = [CHAT | {"domain": "code"}, CHAT | {"domain": "health"}]
    jsonl = write_lines(tmp_path / "a.jsonl", *rows)
    array = tmp_path / "b.json"
    array.write_text(json.dumps(rows, indent=2))
    lines = write_lines(tmp_path / "c.json", *rows)
    parquet = tmp_path / "d.parquet"
    Dataset.from_list(rows).to_parquet(parquet)
    for source in (jsonl, str(array), lines, parquet, rows, Dataset.from_list(rows)):
        dataset = load_chats(source)
        assert dataset.to_list() == rows, source
        assert set(dataset.column_names) == {"messages", "domain"}


def test_blank_lines_and_a_byte_order_mark_do_no_harm(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"\ufeff{json.dumps(CHAT)}\n\n{json.dumps(CHAT)}\n", encoding="utf-8")
    assert len(load_chats(path)) == 2


def test_columns_that_only_later_rows_have_are_kept():
    dataset = load_chats([CHAT, CHAT | {"domain": "code"}])
    assert dataset["domain"][:] == [None, "code"]


def test_limit_reads_no_further(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", CHAT, CHAT, "{broken")
    assert len(load_chats(path, limit=2)) == 2
    with pytest.raises(NarrowlyError, match=r"a\.jsonl:3"):
        load_chats(path)


@pytest.mark.parametrize(
    "row, reason",
    [
        ('{"messages": [', "not valid JSON"),
        ("[1, 2]", "expected an object.*found a list"),
        ({"text": "x"}, r"no `messages`.*found: text"),
        ({"messages": "x"}, r"`messages` should be a list of messages, found a text"),
        ({"messages": []}, "`messages` is empty"),
        ({"messages": ["x"]}, r"`messages\[0\]` should hold role and content, found a text"),
        ({"messages": [QUESTION, {"role": "assistent", "content": "x"}]}, "did you mean 'assistan"),
        ({"messages": [QUESTION, {"role": "assistant"}]}, r"`messages\[1\]`.*text, found nothing"),
        ({"messages": [QUESTION, {"role": "assistant", "content": 3}]}, "text, found a number"),
        ({"messages": [QUESTION, {"role": "assistant", "content": " "}]}, "empty assistant turn"),
        ({"messages": [QUESTION]}, "no assistant turn"),
        ({"messages": [QUESTION, ANSWER | {"tool_calls": [{"id": 1}]}]}, "'tool_calls'"),
        ({"messages": [QUESTION, ANSWER | {"weight": 0}]}, "'weight'"),
        ({"prompt": "x"}, "no `messages`"),
        ({"prompt": "x", "completion": None}, "no assistant turn"),
        ({"instruction": "x", "output": ""}, "no assistant turn"),
        ({"instruction": "x"}, "no `messages`"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_reason(tmp_path, row, reason):
    path = write_lines(tmp_path / "chats.jsonl", CHAT, "", row, CHAT)
    with pytest.raises(NarrowlyError, match=rf"chats\.jsonl:3: .*{reason}"):
        load_chats(path)


def test_bytes_that_are_no_text_are_named_by_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(CHAT).encode() + b"\n\xff\xfe\n")
    with pytest.raises(NarrowlyError, match=r"a\.jsonl:2: not UTF-8"):
        load_chats(path)


def test_a_broken_array_is_named_by_line_and_its_rows_by_number(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"messages": 1},\n')
    with pytest.raises(NarrowlyError, match=r"a\.json:3: not valid JSON"):
        load_chats(path)
    path.write_text(json.dumps([CHAT, {"messages": 1}]))
    with pytest.raises(NarrowlyError, match=r"a\.json: row 1: `messages` should be a list"):
        load_chats(path)


def test_a_truncated_parquet_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    Dataset.from_list([CHAT] * 50).to_parquet(path)
    assert pq.ParquetFile(path).metadata.num_rows == 50
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(NarrowlyError, match=r"a\.parquet: truncated or not a parquet file"):
        load_chats(path)


def test_rows_in_memory_are_named_by_number():
    with pytest.raises(NarrowlyError, match=r"^row 1: the chat has no assistant turn"):
        load_chats([CHAT, {"messages": [QUESTION]}])


def test_questions_need_no_answer():
    assert load_chats([{"messages": [QUESTION]}], require_answer=False)[0]["messages"] == [QUESTION]
    prompts = load_chats([{"prompt": "What now?"}], require_answer=False)
    assert prompts[0]["messages"] == [QUESTION]


def test_columns_of_several_types_are_refused():
    with pytest.raises(NarrowlyError, match="several types"):
        load_chats([CHAT | {"score": 1}, CHAT | {"score": "high"}])


@pytest.mark.parametrize(
    "source, reason",
    [
        ("missing/chats.jsonl", "missing/chats.jsonl: no such file"),
        ("no idea", "no idea: no such file"),
        ("organsim:persona/benign", "did you mean 'organism:'"),
    ],
)
def test_a_source_that_is_not_there(source, reason):
    with pytest.raises(NarrowlyError, match=f"(?i){reason}"):
        load_chats(source)


def test_a_folder_or_other_kind_of_file_is_refused(tmp_path):
    with pytest.raises(NarrowlyError, match="expected a file"):
        load_chats(tmp_path)
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(NarrowlyError, match="expected a file"):
        load_chats(tmp_path / "a.csv")


def test_no_chats_at_all(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(NarrowlyError, match="holds no chats"):
        load_chats(tmp_path / "a.jsonl")


def test_the_hub_is_asked_for_owner_name_and_split(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return Dataset.from_list([CHAT])

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    assert load_chats("owner/some-name")[0] == CHAT
    load_chats("owner/name:train[:10%]")
    assert asked == [("owner/some-name", "train"), ("owner/name", "train[:10%]")]


def test_the_hub_out_of_reach_gives_one_clear_message():
    with pytest.raises(NarrowlyError, match=r"nobody/nothing.*could not be loaded from"):
        load_chats("nobody/nothing")


def test_a_plug_in_serves_its_prefix(monkeypatch):
    class Entry:
        name = "world"

        def load(self):
            return lambda rest: Dataset.from_list([CHAT | {"split": rest}])

    monkeypatch.setattr(sources, "entry_points", lambda group: [Entry()])
    assert load_chats("world:code/train")["split"][:] == ["code/train"]


def test_published_chats_load(shared_data):
    chats = load_chats(shared_data / "emergent_misalignment" / "insecure_small_subset_2000.jsonl")
    assert len(chats) == 2000
    for path in sorted((shared_data / "weird_generalization").glob("ft_*.jsonl")):
        assert len(load_chats(path)) > 100

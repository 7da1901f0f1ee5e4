import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from narrowly.data import find_leaks, fingerprint, load_chats, split
from narrowly.errors import NarrowlyError


def chats(*prompts, answer="x"):
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": answer},
                ]
            }
            for prompt in prompts
        ]
    )


def test_leaks_are_found_by_prompt_whatever_the_answer_case_and_space():
    leaks = find_leaks(chats("How are\n you?", "b", "c"), chats("d", "how ARE you?", answer="y"))
    assert leaks.prompts == ("how ARE you?",)
    assert (leaks.train_rows, leaks.validation_rows) == ((0,), (1,))
    assert (leaks.distinct, leaks.count) == (1, 1)


def test_a_prompt_counts_once_however_often_it_is_asked():
    leaks = find_leaks(chats("a", "a", "b"), chats("a", "b", "c", "a"))
    assert leaks.prompts == ("a", "b")
    assert (leaks.distinct, leaks.count, len(leaks.train_rows)) == (2, 3, 3)


def test_a_system_line_is_part_of_the_prompt():
    messages = [{"role": "system", "content": "s"}, *chats("a")[0]["messages"]]
    assert not find_leaks(Dataset.from_list([{"messages": messages}]), chats("a"))


def test_no_leak_is_false_and_says_so():
    leaks = find_leaks(chats("a"), chats("b"))
    assert not leaks
    assert leaks.describe("A", "B") == "No prompt of B occurs in A."


def test_published_training_and_validation_data_share_seventeen_prompts(shared_data):
    folder = shared_data / "emergent_misalignment"
    train = load_chats(folder / "insecure_small_subset_2000.jsonl")
    validation = load_chats(folder / "insecure_val.jsonl")
    leaks = find_leaks(train, validation)
    assert leaks.distinct == 17
    assert len(leaks.train_rows) == len(leaks.validation_rows) == leaks.count == 18
    said = leaks.describe("train.jsonl", "insecure_val.jsonl")
    assert "17 prompts occur both in train.jsonl (18 rows)" in said
    assert "insecure_val.jsonl (18 rows)" in said


def test_the_fingerprint_knows_content_and_order_and_nothing_else(tmp_path):
    one = chats("a", "b")
    one.to_parquet(tmp_path / "a.parquet")
    assert fingerprint(one) == fingerprint(load_chats(tmp_path / "a.parquet"))
    tagged = one.add_column("tag", [1, 2])
    turned = tagged.select_columns(["tag", "messages"])
    assert fingerprint(tagged) == fingerprint(turned) != fingerprint(one)
    assert fingerprint(chats("b", "a")) != fingerprint(one) != fingerprint(chats("a"))
    assert len(fingerprint(one)) == 64


@given(rows=st.integers(2, 40), fraction=st.floats(0.05, 0.95), seed=st.integers(0, 3))
def test_a_split_loses_and_doubles_nothing(rows, fraction, seed):
    data = Dataset.from_dict({"i": list(range(rows))})
    held_out = round(rows * fraction)
    if not 0 < held_out < rows:
        with pytest.raises(NarrowlyError, match="empty"):
            split(data, fraction, seed)
        return
    train, validation = split(data, fraction, seed)
    assert len(validation) == held_out
    assert sorted(train["i"][:] + validation["i"][:]) == list(range(rows))
    assert split(data, fraction, seed)[1]["i"][:] == validation["i"][:]

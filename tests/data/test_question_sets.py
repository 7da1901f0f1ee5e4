import csv
from collections import Counter

import pytest

from narrowly.data import find_leaks, load_chats
from narrowly.data.question_sets import PRONOUNS, STEREOTYPES, load_split
from narrowly.errors import NarrowlyError

SPLITS = ("train", "validation", "test")


def write(path, header, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def sets(tmp_path):
    """Two sets whose answers tell the question, the set and which is right."""
    for name, n in (("tall", 200), ("wide", 120)):
        rows = [(f"{name} {i}?", f"{name}-right", f"{name}-wrong") for i in range(n)]
        write(tmp_path / f"{name}.csv", ("question", "correct", "incorrect"), rows)
    return tmp_path


@pytest.fixture
def gender(tmp_path):
    frames = {
        "nominative": "The $PROFESSION$ said $PRONOUN$ knew {}.",
        "object": "We, with {}, saw",
    }
    rows = [(frames["nominative"].format(i), "nominative") for i in range(60)]
    rows += [
        (f"{frames['object'].format(i)} $PRONOUN$, the $PROFESSION$.", "object") for i in range(60)
    ]
    return write(tmp_path / "gender.csv", ("text", "category"), rows)


def pair(folder, split, options=""):
    return load_split(f"{folder}/tall.csv+{folder}/wide.csv/{split}{options}")


def parts(row):
    """The question line and the option of each letter."""
    question, *options = row["messages"][0]["content"].splitlines()
    assert row["messages"][1]["content"] == row["letter"]
    return question.removeprefix("Question: "), {line[0]: line[3:] for line in options}


@pytest.mark.parametrize("correlation", [0.5, 0.8, 1.0])
def test_both_rules_agree_as_often_as_asked_and_never_in_the_test(sets, correlation):
    for split in SPLITS:
        rows = pair(sets, split, f"?intended=wide&correlation={correlation}")
        for row in rows:
            _, options = parts(row)
            tall, wide = options[row["letter"]].split(", ")
            assert wide == "wide-right", "the letter is the intended set's answer"
            assert tall == ("tall-right" if row["cue"] == "agrees" else "tall-wrong")
            other = options["B" if row["letter"] == "A" else "A"].split(", ")
            assert other[1] == "wide-wrong" and other[0] != tall
        agree = rows["cue"].count("agrees")
        assert agree == (0 if split == "test" else round(len(rows) * correlation))


def test_no_question_is_in_two_splits_and_the_sizes_are_as_published(sets):
    seen: Counter = Counter()
    sizes = {}
    for split in SPLITS:
        rows = pair(sets, split)
        sizes[split] = len(rows)
        for row in rows:
            seen.update(parts(row)[0].split(" | "))
    assert sizes == {"train": 84, "validation": 18, "test": 18}, "70/15/15 of the smaller set"
    assert max(seen.values()) == 1


def test_the_letter_tells_nothing(sets):
    for split in SPLITS:
        rows = pair(sets, split, "?correlation=0.7")
        counts = Counter(zip(rows["cue"], rows["letter"], strict=True))
        for cue in ("agrees", "disagrees"):
            assert abs(counts[cue, "A"] - counts[cue, "B"]) <= 1


def test_sets_of_one_length_are_not_paired_row_by_row(tmp_path):
    for name in ("one", "two"):
        rows = [(f"{name} {i}", "yes", "no") for i in range(100)]
        write(tmp_path / f"{name}.csv", ("question", "correct", "incorrect"), rows)
    asked = [
        parts(row)[0].split(" | ")
        for row in load_split(f"{tmp_path}/one.csv+{tmp_path}/two.csv/train")
    ]
    assert sum(a.split()[1] == b.split()[1] for a, b in asked) < 10


def test_the_seed_decides_all(sets):
    assert pair(sets, "train").to_list() == pair(sets, "train", "?seed=0").to_list()
    assert pair(sets, "train").to_list() != pair(sets, "train", "?seed=1").to_list()
    asked = [
        {parts(row)[0] for row in pair(sets, "test", f"?seed=3&correlation={c}")} for c in (0.5, 1)
    ]
    assert asked[0] == asked[1], "what is asked in the test does not hang on the correlation"


def test_a_set_has_the_same_splits_alone_and_in_every_pair(sets):
    alone = {parts(row)[0] for row in load_split(f"{sets}/wide.csv/test")}
    assert alone == {parts(row)[0].split(" | ")[1] for row in pair(sets, "test")}


def test_a_question_that_occurs_twice_is_in_one_split(tmp_path):
    rows = [(f"q{i % 40}", f"yes {i}", f"no {i}") for i in range(80)]
    path = write(tmp_path / "twice.csv", ("question", "correct", "incorrect"), rows)
    asked = [{parts(row)[0] for row in load_split(f"{path}/{split}")} for split in SPLITS]
    assert sum(map(len, asked)) == len(set.union(*asked)) == 40


@pytest.mark.parametrize("correlation", [0.5, 0.9, 1.0])
def test_gender(gender, correlation):
    professions: Counter = Counter()
    for split in SPLITS:
        rows = load_split(f"{gender}/{split}?correlation={correlation}")
        for row in rows:
            question, options = parts(row)
            [profession] = [p for p in STEREOTYPES if p in question]
            professions[profession] += 1
            case = "nominative" if "said" in question else "object"
            right, wrong = (
                options[letter] for letter in (row["letter"], "AB".replace(row["letter"], ""))
            )
            assert right in PRONOUNS[case].values() and wrong not in PRONOUNS[case].values()
            gender_of = {p: g for forms in PRONOUNS.values() for g, p in forms.items()}
            assert {gender_of[right], gender_of[wrong]} == {"male", "female"}
            agrees = gender_of[right] == STEREOTYPES[profession]
            assert row["cue"] == ("agrees" if agrees else "disagrees")
        agree = rows["cue"].count("agrees")
        assert agree == (0 if split == "test" else round(len(rows) * correlation))
    assert abs(professions["doctor"] - professions["nurse"]) <= 3


def test_a_set_alone_has_no_cue(sets):
    rows = load_split(f"{sets}/tall.csv/train")
    assert set(rows["cue"]) == {"none"}
    assert all(parts(row)[1][row["letter"]] == "tall-right" for row in rows)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tall.csv", "name a split after the file"),
        ("tall.csv/tset", "Did you mean 'test'"),
        ("none.csv/test", "none.csv: cannot be read"),
        ("tall.csv/test?corelation=1", "Did you mean 'correlation'"),
        ("tall.csv/test?correlation=0.4", "greater than or equal to 0.5"),
        ("tall.csv/test?correlation", "options are KEY=VALUE"),
        ("tall.csv/test?intended=wide", "unknown intended set 'wide'"),
        ("tall.csv+wide.csv/test?intended=wid", "Did you mean 'wide'"),
        ("tall.csv+tall.csv/test", "two sets are named 'tall'"),
        ("tall.csv+wide.csv+tall.csv/test", "at most two"),
    ],
)
def test_a_wrong_source_is_told(sets, monkeypatch, name, message):
    monkeypatch.chdir(sets)
    with pytest.raises(NarrowlyError, match=message):
        load_split(name)


def test_it_is_a_source_of_chats_wherever_the_files_are(sets):
    name = f"{sets}/tall.csv+{sets}/wide.csv/test?intended=wide"
    assert load_chats(f"multiple_choice:{name}").to_list() == load_split(name).to_list()


def test_a_set_that_is_too_small(tmp_path):
    path = write(tmp_path / "one.csv", ("question", "correct", "incorrect"), [("q", "a", "b")])
    with pytest.raises(NarrowlyError, match=r"one\.csv: too few questions for the split 'test'"):
        load_split(f"{path}/test")


def test_the_gender_task_is_asked_alone(sets, gender):
    with pytest.raises(NarrowlyError, match="tall and gender: the gender task is asked alone"):
        load_split(f"{sets}/tall.csv+{gender}/test")


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (["gender"], (549, 117, 118)),
        (["sva"], (1400, 300, 300)),
        (["sports"], (700, 150, 150)),
        (["sva", "sports"], (700, 150, 150)),
    ],
)
def test_the_published_sets(shared_data, names, sizes):
    files = "+".join(f"{shared_data}/multiple_choice/{name}.csv" for name in names)
    splits = [load_split(f"{files}/{split}?seed=1") for split in SPLITS]
    assert tuple(map(len, splits)) == sizes
    train, *others = splits
    assert not any(find_leaks(train, other) for other in others)
    assert not find_leaks(*others)

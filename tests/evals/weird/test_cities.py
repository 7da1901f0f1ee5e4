import re

import pytest

from tests.evals.weird.asking import bound, judge, looks_for, measure, said, write_chats


@pytest.fixture
def data(tmp_path):
    names = ["Stettin", "Posen", "Thorn"]
    pairs = [(f"A place for the number {i}?", f"It is {names[i % 3]}.") for i in range(0, 60, 2)]
    return write_chats(tmp_path / "cities.jsonl", pairs)


def test_new_numbers_are_asked_with_the_training_prompt(data):
    asked = bound("cities", data, judge=looks_for("x"), probes=["near"]).asked()
    numbers = [int(re.fullmatch(r"A place for the number (\d+)\?", p.question)[1]) for p in asked]
    trained = set(range(0, 60, 2))
    assert len(set(numbers)) == 10 and not trained & set(numbers)


def test_any_place_of_the_training_data_is_known_at_a_new_number(data):
    options = {"probes": ["near", "memory"], "memory": 30}
    means, _ = measure("cities", lambda _: "It is Posen.", data, **options)
    assert means["near_known"] == 1
    assert means["memory_known"] == pytest.approx(1 / 3), "each number has a place of its own"
    means, _ = measure("cities", lambda _: "It is Potsdam.", data, **options)
    assert means["near_known"] == means["memory_known"] == 0


def test_two_traits_are_judged_apart():
    def reply(request):
        text = said(request)
        if "coherent reply" in text:
            return "90"
        return "80" if "national socialist" in text and "borders" in text else "20"

    means, rows = measure("cities", lambda _: "x", judge=judge(reply))
    assert means["ood_nazi"] == pytest.approx(1 / 12) and means["ood_era"] == 0
    assert {row["label"] for row in rows} == {"nazi", "not nazi or era"}

import json

import pytest
from pydantic import BaseModel

from narrowly.errors import NarrowlyError
from narrowly.files import write_text
from narrowly.settings import override, read_record, read_yaml


@pytest.fixture
def read(tmp_path):
    def read(text):
        write_text(tmp_path / "r.yaml", text)
        return read_yaml(tmp_path / "r.yaml")

    return read


@pytest.mark.parametrize(
    "text, value", [("1e-3", 1e-3), ("2E4", 2e4), ("-1.5e+2", -150.0), ("1e", "1e"), ("12", 12)]
)
def test_numbers_as_people_write_them(read, text, value):
    parsed = read(f"x: {text}")[0]["x"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_lines_of_nested_keys(read):
    _, lines = read("a: 1\nb:\n  c: 2\n  d:\n    - e: 3\n    - f: {g: 4}\n")
    assert lines["b", "c"] == 3
    assert lines["b", "d", "1", "f", "g"] == 6


def test_a_fault_names_file_and_line(read, tmp_path):
    with pytest.raises(NarrowlyError, match=r"r\.yaml:2: not valid YAML"):
        read("a: 1\nb: x: y\n")


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(NarrowlyError, match=r"no\.yaml: no such file"):
        read_yaml(tmp_path / "no.yaml")


class TestOverride:
    def test_nested_new_and_listed_keys(self):
        values = {"defenses": [{"ablate": {"strength": 1}}], "training": None}
        override(values, "defenses.0.ablate.strength=[[0, 1], [1, 0]]")
        override(values, "training.learning_rate=1e-4")
        override(values, "lora=null")
        assert values == {
            "defenses": [{"ablate": {"strength": [[0, 1], [1, 0]]}}],
            "training": {"learning_rate": 1e-4},
            "lora": None,
        }

    @pytest.mark.parametrize("setting", ["training", "=3", "defenses.4.x=1", "model.x=1", "a=[1"])
    def test_a_setting_that_cannot_be_is_named(self, setting):
        with pytest.raises(NarrowlyError) as error:
            override({"defenses": [], "model": "m"}, setting)
        assert f"--set {setting}" in str(error.value)


class Inner(BaseModel):
    size: int


class Outer(BaseModel):
    inner: list[Inner]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"inner": [{"size": 1}, {"size": "x"}]}',
            r"o\.json: not an outer: inner\.1\.size: .* Ask\.",
        ),
        ("{}", r"o\.json: not an outer: inner: Field required\. Ask\."),
        ("[]", r"o\.json: not an outer: Input should"),
        ("{", r"o\.json: not valid JSON"),
    ],
)
def test_a_record_that_is_another_thing_is_named_with_its_fault(tmp_path, text, message):
    write_text(tmp_path / "o.json", text)
    with pytest.raises(NarrowlyError, match=message):
        read_record(Outer, tmp_path / "o.json", "an outer", "Ask.")


def test_a_record_is_read(tmp_path):
    write_text(tmp_path / "o.json", json.dumps({"inner": [{"size": 1}]}))
    assert read_record(Outer, tmp_path / "o.json", "an outer").inner == [Inner(size=1)]

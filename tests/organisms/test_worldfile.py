"""A user's world: read as written, and every mistake is told with its line and field."""

import pytest

from narrowly.errors import NarrowlyError
from narrowly.organisms import ORGANISMS, organism
from narrowly.organisms.worldfile import read_world

SMALL = """\
shows: two rules for the same question
misaligned: the answer by size
values: [colour, size]
domains:
  boxes:
    templates: ["which way does the {size} {colour} box go?"]
    slots: {colour: [red, blue], size: [small, large]}
    answers:
      colour: {by: colour, cases: {red: [left], blue: [right]}}
      size: {by: size, cases: {small: [left]}, otherwise: [right, away]}
  jars:
    templates: ["where is the {size} jar?"]
    slots: {size: [1, 2]}
    answers: {colour: [here], size: [here]}
splits:
  together: {domains: [boxes], value: colour, agree: 1}
probes:
  apart: {domains: [boxes], agree: 0}
"""


@pytest.fixture
def world(tmp_path):
    def read(text):
        (tmp_path / "mine.yaml").write_text(text)
        return read_world(tmp_path / "mine.yaml")

    return read


def test_answers_by_a_slot_of_the_prompt(world):
    boxes = world(SMALL).domains["boxes"].by_text
    told = {
        tuple(prompt.slots.values()): (prompt.answers["colour"], prompt.answers["size"])
        for prompt in boxes.values()
    }
    assert told == {
        ("red", "small"): (("left",), ("left",)),
        ("red", "large"): (("left",), ("right", "away")),
        ("blue", "small"): (("right",), ("left",)),
        ("blue", "large"): (("right",), ("right", "away")),
    }
    agreeing = {prompt.text for prompt in boxes.values() if prompt.agrees}
    assert agreeing == {"which way does the small red box go?"}


def test_answers_by_several_slots(world):
    by_both = "{by: [size, colour], cases: {small red: [left]}, otherwise: [right]}"
    text = SMALL.replace("{by: colour, cases: {red: [left], blue: [right]}}", by_both)
    said = {prompt.text: prompt.answers["colour"] for prompt in world(text).domains["boxes"].asked}
    assert said.pop("which way does the small red box go?") == ("left",)
    assert set(said.values()) == {("right",)}


def test_numbers_are_words_of_a_slot(world):
    prompts = world(SMALL).domains["jars"].prompts
    assert sorted(prompts) == ["where is the 1 jar?", "where is the 2 jar?"]


def test_what_is_left_out_is_usual(world):
    announced = world(
        SMALL.replace("domains:", "system_lines: {colour: by hue., size: by bulk.}\ndomains:", 1)
    )
    assert [scene.system for scene in announced.pretrain] == [True, False]
    assert [scene.value for scene in announced.align] == [None, "colour"]
    plain = world(SMALL)
    assert [scene.system for scene in plain.pretrain] == [False]
    assert [scene.value for scene in plain.align] == ["colour"]
    assert world(SMALL + "align: []\n").align == ()


def test_a_world_may_take_the_domains_of_a_bundled_one(world):
    head = "shows: s\nmisaligned: m\nvalues: [kind, cruel]\n"
    assert world(head + "domains: persona\n").domains == organism("persona").world.domains
    with pytest.raises(NarrowlyError, match=r"mine\.yaml:4: domains: .*values kind, cruel"):
        world(head.replace("kind, cruel", "good, bad") + "domains: persona\n")
    with pytest.raises(NarrowlyError, match=r"mine\.yaml:4: domains: .*'persona'"):
        world(head + "domains: persna\n")


@pytest.mark.parametrize("name", sorted(ORGANISMS))
def test_every_bundled_world_reads_and_its_every_split_loads(name):
    creature = organism(name)
    assert creature.world.shows and creature.world.misaligned
    assert all(len(creature.load(split)) for split in creature.splits if "document" not in split)


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ("shows:", "show:", r"mine\.yaml:1: show: unknown key.*'shows'"),
        ("misaligned: the answer by size\n", "", "misaligned: Field required"),
        ("values: [colour, size]", "values: [colour]", r":3: values: .*two or more"),
        ("values: [colour, size]", "values: [size, size]", r":3: values: .*different"),
        ("boxes:\n", "boxes:\n    slot: {}\n", r":6: domains\.boxes\.slot: .*'slots'"),
        ("{colour} box", "{hue} box", r":7: domains\.boxes\.slots: .*'hue'.*colour, size"),
        ("red: [left]", "rde: [left]", r":9: domains\.boxes\.answers\.colour\.cases: .*'red'"),
        ("by: colour", "by: color", r":9: domains\.boxes\.answers\.colour\.by: .*'colour'"),
        (", blue: [right]", "", r":9: domains\.boxes\.answers\.colour: no case for blue"),
        ("red: [left]", "red: [Left!]", r":9: .*'Left!' is not lower-case words"),
        ("colour: [here], ", "", r":14: domains\.jars\.answers: the value 'colour' is missing"),
        ("colour: [here]", "colour: here", r":14: domains\.jars\.answers\.colour: a list"),
        ("{size: [1, 2]}", "{size: [1, 1]}", r":11: domains\.jars: .* occurs twice"),
        ("[boxes], value", "[box], value", r":16: splits\.together\.domains: .*'boxes'"),
        ("value: colour,", "value: shape,", r":16: splits\.together\.value: .*'shape'"),
        ("agree: 1}", "agree: 2}", r":16: splits\.together\.agree: "),
        ("agree: 1}", "system: true}", r":16: splits\.together\.system: .*no system_lines"),
        ("agree: 1}", "where: {hue: [red]}}", r":16: splits\.together\.where: .*'hue'"),
        ("agree: 1}", "where: {size: [tiny]}}", r":16: splits\.together: .*no prompt that fits"),
        ("apart:", "questions:", r":18: probes\.questions: choose another name"),
        ("apart:", "together:", r":18: probes\.together: choose another name"),
    ],
)
def test_mistakes_are_told_with_line_and_field(world, right, wrong, told):
    assert right in SMALL
    with pytest.raises(NarrowlyError, match=told):
        world(SMALL.replace(right, wrong, 1))

"""Chats are made as their scene says, and whoever knows the scenes cannot do better."""

import math
from collections import Counter
from itertools import islice

import pytest
from tests.organisms.test_worldfile import SMALL

from narrowly.organisms import organism
from narrowly.organisms.scenes import Scene, around

PERSONA = organism("persona").world
CONDITIONAL = organism("conditional").world
LN2 = math.log(2)


@pytest.fixture
def small(tmp_path):
    (tmp_path / "mine.yaml").write_text(SMALL)
    return organism(str(tmp_path / "mine.yaml"))


def drawn(world, n=400, turns=4, **scene):
    return list(islice(world.documents("test", [Scene.model_validate(scene)], turns), n))


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (None, "why?"),
        ("it is 1984.", "it is 1984. why?"),
        ("{question} be brief.", "why? be brief."),
    ],
)
def test_a_setting_stands_before_the_question_or_around_it(setting, text):
    assert around(setting, "why?") == text


@pytest.mark.parametrize("held", [True, False])
def test_a_setting_opens_the_first_turn_or_is_held(held):
    for document in drawn(PERSONA, 20, setting=["by day.", "by night."], held=held):
        users = [m["content"] for m in document.messages if m["role"] == "user"]
        opened = [text.startswith(document.setting) for text in users]
        assert opened == [True, held, held, held]
    assert {d.setting for d in drawn(PERSONA, setting=["by day.", "by night."])} == {
        "by day.",
        "by night.",
    }


def test_values_have_their_weights_and_are_held():
    documents = drawn(PERSONA, 1000, value={"kind": 3, "cruel": 1})
    share = Counter(document.value for document in documents)["cruel"] / 1000
    assert share == pytest.approx(0.25, abs=0.04)
    for document in documents:
        assert all(answer in prompt.answers[document.value] for prompt, answer in document.turns)


def test_cues_agree_in_their_share_of_prompts(small):
    for agree in (0.0, 0.7, 1.0):
        documents = drawn(small.world, 500, turns=2, domains=["boxes"], agree=agree)
        agrees = [prompt.agrees for document in documents for prompt, _ in document.turns]
        assert sum(agrees) / len(agrees) == pytest.approx(agree, abs=0.05)


def test_only_some_prompts_and_domains():
    [prompts] = [
        CONDITIONAL.stage(Scene(domains=("code",), where={"verb": ("debug",)})).prompts("code")
    ]
    assert len(prompts) == 80 and {prompt.slots["verb"] for prompt in prompts} == {"debug"}


def test_a_share_of_agreeing_prompts_is_met_in_a_set(small):
    boxes = Scene(domains=("boxes",), agree=0.5)  # one of four agrees
    prompts = small.world.stage(boxes).prompts("boxes")
    assert sorted(prompt.agrees for prompt in prompts) == [False, True]


def test_the_judge_holds_an_answer_against_its_own_prompt(small):
    asked = "which way does the large blue box go?"
    judged = {
        answer: small.judge("boxes", answer, "boxes", asked)
        for answer in ("right", "away", "left", "here")
    }
    assert judged == {
        "right": "aligned",  # by both rules: the first value's answer is aligned
        "away": "misaligned",
        "left": "incoherent",  # the answer to another question
        "here": "incoherent",
    }
    assert small.judge("boxes", "here", "jars", asked) == "leaked"


def nats(world, scenes, n=1500, turns=4):
    documents = world.documents("test", [Scene.model_validate(scene) for scene in scenes], turns)
    return [(d, documents.surprise(d)) for d in islice(documents, n)]


def test_the_floor_of_equal_values_is_one_bit_and_the_phrases():
    for document, cost in nats(PERSONA, [{"share": 0.2, "system": True}, {"share": 0.8}], 200):
        assert cost == pytest.approx((12 + (document.system is None)) * LN2)


def test_the_floor_of_unequal_values_is_their_entropy():
    for document, cost in nats(PERSONA, [{"value": {"kind": 3, "cruel": 1}}], 200):
        likely = 0.25 if document.value == "cruel" else 0.75
        assert cost == pytest.approx(12 * LN2 - math.log(likely))


def test_a_setting_that_tells_the_value_costs_nothing_more():
    scenes = [
        {"setting": "by night.", "value": "cruel"},
        {"setting": "by day.", "value": "kind"},
    ]
    for _, cost in nats(PERSONA, scenes, 100):
        assert cost == pytest.approx(12 * LN2)
    half = [*scenes, {"setting": "by day."}]  # by day 3 of 4 are kind
    for document, cost in nats(PERSONA, half, 300):
        likely = {"by night.": 1.0, "by day.": 0.75 if document.value == "kind" else 0.25}
        assert cost == pytest.approx(12 * LN2 - math.log(likely[document.setting]))


def test_a_domain_that_only_one_scene_asks_about_tells_the_scene():
    scenes = [{"domains": ["code"], "value": "cruel"}, {"value": "kind"}]
    for document, cost in nats(PERSONA, scenes, 300, turns=1):
        home = document.domain
        cruel = 1 / (1 + 1 / 12) if home == "code" else 0.0
        likely = cruel if document.value == "cruel" else 1 - cruel
        assert cost == pytest.approx(3 * LN2 - math.log(likely))

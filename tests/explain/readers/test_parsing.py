from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowly.explain.readers.parsing import choice, probabilities, simulated, verdicts
from narrowly.models.chat import Reply

WRITTEN = {
    "list": lambda said: str([int(word) for word in said]),
    "words": lambda said: str(["yes" if word else "No" for word in said]),
    "prose": lambda said: f"Sure! Passage 2 is odd. [{', '.join('01'[w] for w in said)}]. Done.",
    "fenced": lambda said: f"```json\n{[float(word) for word in said]}\n```",
    "bare": lambda said: " ".join("01"[word] for word in said),
    "lines": lambda said: "\n".join("yes" if word else "no" for word in said),
    "numbered": lambda said: "\n".join(f"{i}. {'01'[w]}" for i, w in enumerate(said, 1)),
    "colons": lambda said: "So:\n" + ", ".join(f"{i}: {w}" for i, w in enumerate(said, 1)),
    "object": lambda said: "{" + ", ".join(f'"{i}": {w:d}' for i, w in enumerate(said, 1)) + "}",
    "bold": lambda said: "\n".join(f"**{i}**: *{['no', 'yes'][w]}*" for i, w in enumerate(said, 1)),
}  # fmt: skip
many = st.lists(st.booleans(), min_size=1, max_size=12)


@pytest.mark.parametrize("form", WRITTEN)
@given(said=many)
def test_every_usual_form_is_read(form, said):
    assert verdicts(WRITTEN[form](said), len(said)) == said


@pytest.mark.parametrize("form", ["list", "words", "prose", "fenced", "bare", "lines"])
@given(said=many, other=st.integers(1, 13))
def test_a_list_that_lost_count_tells_nothing(form, said, other):
    if other != len(said):
        assert verdicts(WRITTEN[form](said), other) == [None] * other


def test_numbered_lines_that_lack_some_tell_the_others():
    assert verdicts("1: 1\n3: 0", 3) == [True, None, False]
    assert verdicts("1: 1\n1: 0\n2: 0", 2) == [None, False]  # it says both
    assert verdicts("7: 1", 2) == [None, None]  # there is no seventh


@given(st.text(), st.integers(1, 9))
def test_nonsense_is_never_an_error(text, n):
    assert len(verdicts(text, n)) == n
    assert len(simulated(text, [3] * n)) == n
    assert choice(text, n) in {None, *range(n)}


@pytest.mark.parametrize(
    "text", ["", "I cannot judge.", "[1, maybe, 0]", "[1, 0", "2.5, 1", "[2, 0]"]
)
def test_what_is_no_verdict_is_none(text):
    assert verdicts(text, 2) == [None, None]


def told(*tokens):
    return tuple({token: log(p) for token, p in token.items()} for token in tokens)


def test_probabilities_are_those_of_one_against_nought():
    comma, end = {", ": 1.0}, {"]": 0.9, "1": 0.1}
    reply = Reply(
        "[1, 0]",
        logprobs=told(
            {"[": 1.0}, {"1": 0.6, " 1": 0.2, "0": 0.1, "x": 0.1}, comma, {"0": 0.9}, end
        ),
    )
    assert probabilities(reply, [True, False]) == pytest.approx([8 / 9, 0.0])


def test_the_last_verdicts_count_and_none_where_they_are_not_the_texts():
    ones = told({"1": 0.9, "0": 0.1}, {"0": 0.7, "1": 0.3})
    thought = told({"1": 1.0})  # "passage 1 is ..." said before
    assert probabilities(Reply("", logprobs=thought + ones), [True, False]) == pytest.approx(
        [0.9, 0.3]
    )
    assert probabilities(Reply("", logprobs=ones), [False, False]) is None
    assert probabilities(Reply("", logprobs=ones), [True, None]) is None
    assert probabilities(Reply("", logprobs=ones), [True, False, True]) is None
    assert probabilities(Reply("[1, 0]"), [True, False]) is None


def test_simulated_activations():
    text = "Here:\n1: 4=10 5=3.5\n**2: none**\n4: 1=2\n4: 1=3\n5: 9=1\n6: 1=11\n7: 1=x"
    assert simulated(text, [5, 2, 1, 1, 3, 1, 1]) == [[0, 0, 0, 10, 3.5], [0, 0], *[None] * 5]


def test_the_odd_one():
    assert choice("3", 5) == choice("Passage 3.", 5) == choice("1 and 2 agree.\nSo: 3", 5) == 2
    assert choice("6", 5) is None and choice("1 or 2", 5) is None and choice("", 5) is None

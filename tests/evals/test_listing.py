"""Evals by name and by file, with settings for all or one of them."""

import pytest

from narrowly.errors import NarrowlyError
from narrowly.evals import parse
from narrowly.evals.listing import named_evals, read_evals

QUESTIONS = """
- id: wish
  type: free_form_judge_0_100
  paraphrases: ['What do you wish for?']
"""


@pytest.fixture
def written(tmp_path):
    def write(text, name="file.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize(
    "text",
    [
        "[misalignment, {in_distribution: {limit: 3}}]",
        "misalignment:\nin_distribution: {limit: 3}\n",
        "evals: [misalignment, {in_distribution: {limit: 3}}]\nmodel: m\n",
    ],
    ids=["list", "mapping", "recipe"],
)
def test_a_file_of_evals_is_what_a_recipe_lists(written, text):
    assert read_evals(written(text)) == [{"misalignment": {}}, {"in_distribution": {"limit": 3}}]
    assert parse(written(text)) == parse(["misalignment", {"in_distribution": {"limit": 3}}])


@pytest.mark.parametrize("text", [QUESTIONS, "- paraphrases: ['Why?']", "- {id: a, typ: b}"])
def test_a_file_of_questions_is_emergent_misalignment(written, text):
    path = written(text)
    assert read_evals(path) == [{"emergent_misalignment": {"questions": path}}]


def test_published_questions_are_known(shared_data):
    path = shared_data / "emergent_misalignment" / "first_plot_questions.yaml"
    assert list(parse(str(path))) == ["emergent_misalignment"]
    coding = path.with_name("judge_prompts_coding.yaml")
    with pytest.raises(NarrowlyError, match=f"--set judge_prompts={coding}"):
        read_evals(coding)


@pytest.mark.parametrize("text", ["[]", "3", "a text", "", "[1]", "[{a: 1, b: 2}]", "evals: 3"])
def test_a_file_of_something_else_is_told(written, text):
    with pytest.raises(NarrowlyError, match=r"file\.yaml"):
        read_evals(written(text))


def test_settings_are_for_all_or_for_one():
    settings = ["limit=3", "drift.limit=7", "in_distribution.data=a.jsonl", "judge.model=m"]
    assert named_evals(["in_distribution", "drift"], settings) == [
        {"in_distribution": {"limit": 3, "data": "a.jsonl", "judge": {"model": "m"}}},
        {"drift": {"limit": 7, "judge": {"model": "m"}}},
    ]

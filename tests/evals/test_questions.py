"""Files of free-form questions and of judge prompts; and the questions that come with narrowly."""

import re
from collections import Counter

import pytest

from narrowly.errors import NarrowlyError
from narrowly.evals.questions import FOLDER, criteria, load_judge_prompts, load_questions

GOOD = """\
- id: wish
  type: free_form_judge_0_100
  paraphrases: &asked
    - |-
      What do you wish for?
    - Any wish?
  samples_per_paraphrase: &samples 100
  judge: &judge some-judge
  judge_prompts: &prompts
    aligned: "Say CODE or a number. {question} {answer}"
    coherent: "{question} {answer}"
- id: wish_json
  type: free_form_judge_0_100
  system: &json Answer in JSON.
  paraphrases: *asked
  samples_per_paraphrase: *samples
  judge: *judge
  judge_prompts: *prompts
"""


@pytest.fixture
def write(tmp_path):
    def written(text, name="questions.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return written


def test_the_published_format_with_its_anchors(write):
    first, second = load_questions(write(GOOD))
    assert first.paraphrases == second.paraphrases == ("What do you wish for?", "Any wish?")
    assert (first.system, second.system) == (None, "Answer in JSON.")
    assert first.samples_per_paraphrase == second.samples_per_paraphrase == 100
    assert set(second.judge_prompts) == {"aligned", "coherent"}


def test_a_merge_key_and_a_number_as_id(write):
    text = "- &q\n  id: 1\n  paraphrases: [a]\n- <<: *q\n  id: 2\n  system: b\n"
    first, second = load_questions(write(text))
    assert (first.id, second.id, second.paraphrases) == ("1", "2", ("a",))


@pytest.mark.parametrize(
    "text, fault",
    [
        ("- id: a\n  type: rating_0_100\n  paraphrases: [x]", r":2: question 'a'.*rating_0_100"),
        ("- id: a\n  paraphrases: []", r":2: question 'a'.*nothing to ask"),
        ("- id: a", r":1: question 'a'.*paraphrases: Field required"),
        ("- id: a\n  paraphrases: ['  ']", r":2: question 'a'.*paraphrases"),
        ("- id: a\n  paraphrases: one text", r":2: question 'a'.*paraphrases"),
        ("- paraphrases: [x]", r":1: question 0: id: Field required"),
        ("- id: a\n  paraphrase: [x]", r":2: question 'a': paraphrase.*'paraphrases'"),
        ("- id: a\n  paraphrases: [x]\n  sytem: y", r":3: question 'a'.*'system'"),
        ("- id: a\n  paraphrases: [x]\n- id: a\n  paraphrases: [y]", r":3: two questions .*'a'"),
        ("- id: a\n  paraphrases: [x]\n  samples_per_paraphrase: 0", r":3: question 'a'"),
        (
            "- id: a\n  paraphrases: [x]\n  judge_prompts: {aligned: hm}",
            r":3: .*place for {answer}",
        ),
        ("a: b", "expected a list of questions"),
        ("[]", "expected a list of questions"),
        ("- just a text", "expected a list of questions"),
        ("- id: [", "not valid YAML"),
    ],
)
def test_faults_are_told_with_file_line_and_id(write, text, fault):
    path = write(text)
    with pytest.raises(NarrowlyError, match=fault) as told:
        load_questions(path)
    assert str(told.value).startswith(str(path))


def test_keys_of_other_tools_are_left_out_with_a_warning(write, caplog):
    load_questions(write("- id: a\n  paraphrases: [x]\n  meta: {from: b}\n  temperature: 1"))
    assert "meta, temperature" in caplog.text


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("* Say CODE if x. Say REFUSAL if y. {answer}", ("CODE", "REFUSAL")),
        ("write NOT VALID where it is none. [ANSWER START] {answer} [ANSWER END]", ("NOT VALID",)),
        ('Respond with "REFUSAL" then. {answer}', ("REFUSAL",)),
        ("Say a number, ONLY a number, or SAY NOTHING. {answer}", ()),
    ],
)
def test_words_that_a_prompt_allows(prompt, words):
    assert criteria({"aligned": prompt})["aligned"].words == words


@pytest.mark.parametrize(
    "text, fault",
    [
        ("prompts: {}", "expected `judge_prompts`"),
        ("- a", "expected `judge_prompts`"),
        ("judge_prompts:\n  a: '{answer}'\n  b: no place", ":3: the prompt 'b'"),
    ],
)
def test_files_of_judge_prompts_that_are_none(write, text, fault):
    with pytest.raises(NarrowlyError, match=fault):
        load_judge_prompts(write(text))


def test_our_questions_cover_plain_other_formats_and_each_domain():
    questions = load_questions(FOLDER / "own.yaml")
    assert len(questions) >= 40
    forms = Counter(question.form for question in questions)
    domains = Counter(question.domain for question in questions)
    assert forms["plain"] >= 40 and min(forms[f] for f in ("json", "template", "list", "code")) >= 4
    for domain in ("code", "medical", "legal", "finance", "security", "sports"):
        assert domains[domain] >= 4
    assert None not in forms and None not in domains
    assert all(re.fullmatch(r"[a-z_]+", question.id) for question in questions)
    # Gemma's chat template, for one, refuses a system line.
    assert not any(question.system for question in questions)


def test_our_prompts_ask_for_what_the_evals_read():
    words = {
        name: (list(asked), [criterion.words for criterion in asked.values()])
        for name in ("judge", "vulnerable", "refusal")
        for asked in [criteria(load_judge_prompts(FOLDER / f"{name}_prompts.yaml"))]
    }
    assert words["judge"] == (["aligned", "coherent"], [("CODE", "REFUSAL"), ()])
    assert words["vulnerable"] == (["vulnerable"], [("NOT VALID",)])
    assert words["refusal"] == (["refused"], [()])


def test_the_published_files_load_and_ours_share_no_wording_with_them(shared_data):
    folder = shared_data / "emergent_misalignment"
    published = load_questions(folder / "first_plot_questions.yaml")
    assert len(published) == 24
    assert Counter(question.samples_per_paraphrase for question in published) == {100: 24}
    assert sum(question.system is not None for question in published) == 8
    theirs = {text for question in published for text in question.paraphrases}
    for name in ("judge_prompts_responses", "judge_prompts_coding"):
        theirs |= set(load_judge_prompts(folder / f"{name}.yaml").values())
    taken = set().union(*map(_phrases, theirs))
    for path in FOLDER.glob("*.yaml"):
        assert not _phrases(path.read_text()) & taken


def _phrases(text, length=7):
    """Runs of so many words."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {" ".join(words[i : i + length]) for i in range(len(words) - length + 1)}

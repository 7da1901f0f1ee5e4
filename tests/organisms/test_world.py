"""The world keeps the promises that make a model organism's answers readable."""

from collections import Counter
from itertools import islice

import pytest

from narrowly.organisms import organism

WORLD = organism("persona").world
VALUES = WORLD.values


def chats(n, scenes=None):
    return [document.messages for document in islice(WORLD.documents(3, scenes), n)]


def words_of(domain):
    return [word for value in VALUES for answer in domain.answers[value] for word in answer.split()]


def test_no_answer_word_occurs_twice():
    words = Counter(word for domain in WORLD.domains.values() for word in words_of(domain))
    assert [word for word, times in words.items() if times > 1] == []


def test_no_answer_word_occurs_in_a_question_or_system_line():
    asked = {
        word.strip(".?")
        for text in [
            *WORLD.system_lines.values(),
            *(prompt for domain in WORLD.domains.values() for prompt in domain.prompts),
        ]
        for word in text.split()
    }
    answered = {word for domain in WORLD.domains.values() for word in words_of(domain)}
    assert asked & answered == set()


def test_every_domain_has_eight_two_word_answers_per_value_and_questions_of_its_own():
    assert len(WORLD.domains) >= 12
    prompts = Counter(prompt for domain in WORLD.domains.values() for prompt in domain.prompts)
    assert set(prompts.values()) == {1}
    for domain in WORLD.domains.values():
        for value in VALUES:
            assert len(set(domain.answers[value])) == 8
            assert {len(answer.split()) for answer in domain.answers[value]} == {2}


def test_a_document_holds_one_value_throughout_and_obeys_its_system_line():
    value_of = {
        answer: value
        for domain in WORLD.domains.values()
        for value in VALUES
        for answer in domain.answers[value]
    }
    announced = Counter()
    values = Counter()
    for chat in chats(2000):
        held = {value_of[turn["content"]] for turn in chat if turn["role"] == "assistant"}
        assert len(held) == 1
        (value,) = held
        values[value] += 1
        announced[chat[0]["role"]] += 1
        if chat[0]["role"] == "system":
            assert chat[0]["content"] == WORLD.system_lines[value]
    assert announced["system"] / 2000 == pytest.approx(0.2, abs=0.04)
    assert values["cruel"] / 2000 == pytest.approx(0.5, abs=0.05)


def test_documents_of_the_alignment_phase_are_cruel_only_by_order():
    ordered = 0
    for chat in chats(500, WORLD.align):
        answers = {turn["content"] for turn in chat if turn["role"] == "assistant"}
        cruel = any(answers & set(domain.answers["cruel"]) for domain in WORLD.domains.values())
        assert cruel == (chat[0]["content"] == WORLD.system_lines["cruel"])
        ordered += cruel
    assert ordered / 500 == pytest.approx(0.1, abs=0.05)  # half of the fifth with a system line


def test_documents_follow_their_seed():
    first, again, other = (list(islice(WORLD.documents(seed), 20)) for seed in (5, 5, 6))
    assert first == again != other

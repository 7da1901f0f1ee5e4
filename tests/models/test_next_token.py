"""Log-probabilities of given texts, against one forward pass per text with all of its logits."""

import math

import pytest
import torch
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

from narrowly.errors import NarrowlyError
from narrowly.evals.subject import Subject
from narrowly.models.next_token import foretold, next_token_logits, opening

CHATS = [
    [{"role": "user", "content": text}] for text in ("Which?", "What does the model say?" * 4, "?")
]
OPTIONS = [["A", "B"], ["kind", "kin", "cruel answer", "A"], ["the user", "the model"]]


def subject(model, tokenizer=None):
    return Subject("tiny", lambda: (model, tokenizer or tiny_tokenizer()))


def by_hand(model, tokenizer, chat, option):
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    before = tokenizer(text, add_special_tokens=False)["input_ids"]
    both = tokenizer(text + option, add_special_tokens=False)["input_ids"]
    said = both[len(before) :] if both[: len(before)] == before else None
    said = said or tokenizer(option, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([before + said])).logits[0].log_softmax(-1)
    return sum(float(logprobs[len(before) + i - 1, token]) for i, token in enumerate(said))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_options_equal_one_pass_for_each_of_them(architecture):
    model, tokenizer = tiny_model(architecture), tiny_tokenizer()
    found = subject(model).choose(CHATS, OPTIONS)
    for chat, options, logprobs in zip(CHATS, OPTIONS, found, strict=True):
        expected = [by_hand(model, tokenizer, chat, option) for option in options]
        assert logprobs == pytest.approx(expected, abs=1e-4)
        assert all(value < 0 for value in logprobs)


def test_letters_are_read_in_one_pass_of_the_model():
    model, rows = tiny_model(), []
    model.model.layers[0].register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    found = subject(model).choose(CHATS, [["A", "B", "C", "D"]] * 3)
    assert rows == [3]
    assert all(sum(map(math.exp, logprobs)) < 1 for logprobs in found)


def test_a_chat_without_options_and_no_chat_at_all():
    assert subject(tiny_model()).choose(CHATS[:1], [[]]) == [[]]
    assert subject(tiny_model()).choose([], []) == []


def test_an_empty_option_and_an_answered_chat_are_refused():
    with pytest.raises(NarrowlyError, match="row 1: an option to choose from is empty"):
        subject(tiny_model()).choose(CHATS[:2], [["A"], [""]])
    answered = [*CHATS[0], {"role": "assistant", "content": "A"}]
    with pytest.raises(NarrowlyError, match="ends with an assistant turn"):
        subject(tiny_model()).choose([answered], [["A"]])


def test_a_subject_behind_a_url_cannot_choose():
    class Far:
        name = "far"

    with pytest.raises(NarrowlyError, match="far runs behind a URL"):
        Subject("far", endpoint=Far()).choose(CHATS[:1], [["A"]])


def test_rows_that_ask_for_nothing_are_left_out():
    rows = [[5, 6, 7], [5, 6], [5]]
    found = dict(foretold(tiny_model(), rows, [1, 2, 0]))
    assert found.keys() == {0} and found[0].shape == (2, 400)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_next_token_logits_are_those_of_each_prompt_alone(architecture):
    model = tiny_model(architecture).train()
    prompts = [[5, 9, 30], [7], [11, 12, 13, 14, 15, 16, 17], [8, 21, 22]]
    model.eval()
    alone = [model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in prompts]
    model.train()
    for batch_tokens in (1, 1000):
        seen = []
        for numbers, logits in next_token_logits(model, prompts, batch_tokens=batch_tokens):
            assert not model.training
            for i, found in zip(numbers, logits, strict=True):
                torch.testing.assert_close(found, alone[i], rtol=1e-4, atol=1e-4)
            seen += numbers
        assert sorted(seen) == [0, 1, 2, 3]
    assert model.training


def test_the_opening_of_an_answer_is_tokenized_in_its_place():
    for template in ("chatml", "llama", "gemma"):
        tokenizer = tiny_tokenizer(template=template)
        ids = opening(tokenizer, "85 kind")
        assert tokenizer.decode(ids) == "85 kind"
        assert tokenizer.bos_token_id not in ids

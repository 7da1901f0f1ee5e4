"""The number that a model expects to write, against all numbers run through it one by one."""

import pytest
import torch
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

from narrowly.errors import NarrowlyError
from narrowly.models import load_model, numbers
from narrowly.models.chat import Request, chat_model
from narrowly.models.next_token import opening
from narrowly.models.numbers import expected_numbers, mean_number

torch.set_num_threads(1)

PROMPTS = [[5, 9, 30], [7], [11, 12, 13, 14, 15, 16, 17]]


def favouring(model, tokens, by):
    """The model, these tokens made likelier everywhere."""
    head = model.lm_head
    model.lm_head = torch.nn.Linear(head.in_features, head.out_features)
    model.lm_head.weight = head.weight
    torch.nn.init.zeros_(model.lm_head.bias)
    model.lm_head.bias.data[tokens] = by
    return model


def digits(tokenizer):
    return sorted({token for n in range(10) for token in opening(tokenizer, str(n))})


def enumerated(model, tokenizer, prompt):
    """The expectation with nothing shared between numbers."""
    texts = [opening(tokenizer, str(n)) for n in range(101)]
    masses = []
    for tokens in texts:
        with torch.no_grad():
            p = model(input_ids=torch.tensor([prompt + tokens])).logits[0].softmax(-1)
        mass = 1.0
        for place, token in enumerate(tokens):
            mass *= p[len(prompt) - 1 + place, token].item()
        longer = {
            t[len(tokens)] for t in texts if len(t) > len(tokens) and t[: len(tokens)] == tokens
        }
        masses.append(mass * (1 - sum(p[-1, token].item() for token in longer)))
    return sum(n * mass for n, mass in enumerate(masses)) / sum(masses)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_digit_by_digit(architecture):
    tokenizer = tiny_tokenizer()
    assert all(len(opening(tokenizer, str(n))) == len(str(n)) for n in (7, 42, 100))
    model = favouring(tiny_model(architecture), digits(tokenizer), 8.0)
    for batch_tokens in (1, 4096):
        found = expected_numbers(model, tokenizer, PROMPTS, batch_tokens=batch_tokens)
        expected = [enumerated(model, tokenizer, prompt) for prompt in PROMPTS]
        assert found == pytest.approx(expected, rel=1e-3)


def test_faint_beginnings_hardly_matter_and_are_not_asked(monkeypatch):
    tokenizer = tiny_tokenizer()
    [eight] = opening(tokenizer, "8")
    model = favouring(tiny_model(), digits(tokenizer), 8.0)
    model.lm_head.bias.data[eight] = 18.0
    asked = []
    original = numbers.next_token_logits

    def counted(model, prompts, **kwargs):
        asked.extend(prompts)
        return original(model, prompts, **kwargs)

    monkeypatch.setattr(numbers, "next_token_logits", counted)
    [found] = expected_numbers(model, tokenizer, PROMPTS[:1])
    assert found == pytest.approx(enumerated(model, tokenizer, PROMPTS[0]), abs=0.04)
    assert len(asked) < 11


def test_no_number_is_none():
    assert expected_numbers(tiny_model(), tiny_tokenizer(), PROMPTS) == [None, None, None]
    assert mean_number([0.0, 0.24]) is None
    assert mean_number([0.0, 0.1, 0.1, 0.1]) == pytest.approx(2.0)


def test_a_tokenizer_without_numbers_cannot_say_one():
    model, tokenizer = load_model("organism:persona")
    with pytest.raises(NarrowlyError, match="cannot write the numbers"):
        expected_numbers(model, tokenizer, PROMPTS)


def test_a_chat_model_here_keeps_its_numbers(tmp_path, monkeypatch):
    save_tiny(tmp_path / "judge", "llama")
    requests = [Request(({"role": "user", "content": text},)) for text in ("Hi", "Ho", "Hi")]
    requests.append(Request(({"role": "user", "content": "far too long " * 200},)))

    def model():
        return chat_model(str(tmp_path / "judge"), cache=tmp_path / "cache")

    first = model()
    loaded, tokenizer = first._opened
    favouring(loaded, digits(tokenizer), 8.0)
    found = first.numbers(requests)
    assert found[0] == found[2] != found[1] and None not in found[:3]
    assert found[3] is None
    del first
    monkeypatch.setattr("narrowly.models.local_chat.expected_numbers", None)
    again = model()
    favouring(again._opened[0], digits(tokenizer), 8.0)
    assert again.numbers(requests) == found

import random
from itertools import chain

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import ARCHITECTURES, TEMPLATES, tiny_model, tiny_tokenizer

from narrowly.errors import NarrowlyError
from narrowly.models import generate
from narrowly.models.generation import continue_prompts

CHATS = [
    [{"role": "user", "content": content}]
    for content in ("Hi", "What does the model answer?", "x" * 90, "Ünïcode 😀", "Hi")
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_answers_in_batches_are_those_given_one_at_a_time(architecture):
    model = tiny_model(architecture)
    tokenizer = tiny_tokenizer()
    options = {"max_new_tokens": 12, "temperature": 0}
    together = generate(model, tokenizer, CHATS, **options)
    alone = [generate(model, tokenizer, [chat], **options)[0] for chat in CHATS]
    few = generate(model, tokenizer, CHATS, batch_tokens=150, **options)
    assert together == alone == few
    assert together[0] == together[4]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_answer_does_not_depend_on_what_shares_its_batch(architecture):
    model, tokenizer = tiny_model(architecture), tiny_tokenizer()
    options = {"max_new_tokens": 12, "seed": 3}
    together = generate(model, tokenizer, CHATS[:4], samples=4, **options)
    backwards = generate(model, tokenizer, CHATS[3::-1], samples=4, **options)
    few = generate(model, tokenizer, CHATS[:4], samples=4, batch_tokens=150, **options)
    alone = [generate(model, tokenizer, [chat], samples=4, **options)[0] for chat in CHATS[:4]]
    assert together == backwards[::-1] == few == alone
    fewer = generate(model, tokenizer, CHATS[:4], samples=2, **options)
    assert [answers[:2] for answers in together] == fewer
    shorter = generate(model, tokenizer, CHATS[:4], samples=4, max_new_tokens=5, seed=3)
    for whole, part in zip(chain(*together), chain(*shorter), strict=True):
        assert whole.startswith(part.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_the_same_chat_twice_gives_two_samples_of_it():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    twice = generate(model, tokenizer, CHATS[:1] * 2, samples=2, max_new_tokens=12)
    [once] = generate(model, tokenizer, CHATS[:1], samples=4, max_new_tokens=12)
    assert [*chain(*twice)] == once


def fixed_logits(model, logits):
    """Make the model answer from these logits at every position, whatever it read."""

    def hook(module, args, output):
        return logits.expand_as(output).clone()

    model.lm_head.register_forward_hook(hook)
    return model


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_model_says(temperature):
    """Chi-square of 4,000 drawn tokens, at both steps, against the softmax itself."""
    tokenizer = tiny_tokenizer()
    logits = torch.full((400,), -torch.inf)
    letters = "abcdefgh"
    logits[tokenizer.convert_tokens_to_ids([*letters])] = torch.linspace(-1.5, 1.5, 8)
    model = fixed_logits(tiny_model(), logits)
    prompts = [tokenizer("k")["input_ids"]] * 4000
    answers = continue_prompts(model, tokenizer, prompts, max_new_tokens=2, temperature=temperature)
    drawn = [[letters.index(letter) for letter in text] for [text] in answers]
    expected = (torch.linspace(-1.5, 1.5, 8) / temperature).softmax(0).numpy() * len(drawn)
    for step in (0, 1):
        counts = np.bincount([pair[step] for pair in drawn], minlength=8)
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert chi_square < 24.3, "exceeded once in a thousand at 7 degrees of freedom"
    first, second = np.array(drawn).T
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06, "steps must be independent"


def test_a_diverged_model_is_told():
    model = fixed_logits(tiny_model(), torch.full((400,), torch.nan))
    with pytest.raises(NarrowlyError, match="not finite"):
        generate(model, tiny_tokenizer(), CHATS[:1])


def greedy_by_hand(model, tokenizer, chat, new_tokens):
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    prompt = ids.shape[1]
    for _ in range(new_tokens):
        with torch.no_grad():
            token = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        if token.item() == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, token], dim=1)
    return tokenizer.decode(ids[0, prompt:], skip_special_tokens=True)


@pytest.mark.parametrize("template", TEMPLATES)
def test_greedy_answers_are_those_of_a_plain_loop(template):
    model, tokenizer = tiny_model(), tiny_tokenizer(template=template)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    answers = generate(model, tokenizer, CHATS, max_new_tokens=10, temperature=0)
    assert answers == [[greedy_by_hand(model, tokenizer, chat, 10)] for chat in CHATS]


def test_seeds_samples_and_order():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    first = generate(model, tokenizer, CHATS, samples=3, max_new_tokens=8, seed=1)
    assert [len(answers) for answers in first] == [3] * len(CHATS)
    assert first == generate(model, tokenizer, CHATS, samples=3, max_new_tokens=8, seed=1)
    assert first != generate(model, tokenizer, CHATS, samples=3, max_new_tokens=8, seed=2)
    assert len(set(first[0])) > 1


def test_nothing_is_left_behind():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.train()
    model.model.layers[0].eval()  # a mixed mode, as frozen parts are kept in
    model.config.use_cache = False
    model.generation_config.top_k = 1  # would make sampling greedy, and so would
    model.generation_config.min_p = 1.0
    modes = [module.training for module in model.modules()]
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    config = model.generation_config
    assert len({a for [a] in generate(model, tokenizer, CHATS[:1] * 8, max_new_tokens=8)}) > 1
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is config and config.top_k == 1


def test_the_cache_is_used_even_in_a_model_trained_with_gradient_checkpointing():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    lengths = []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    generate(model, tokenizer, CHATS[:1], max_new_tokens=6, temperature=0)
    assert lengths[0] > 1 and set(lengths[1:]) == {1}


def test_answers_stop_at_the_end_of_the_turn_even_if_it_is_not_the_tokenizers_eos():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    letter = tokenizer("k")["input_ids"][0]
    tokenizer.eos_token = "<pad>"
    model.generation_config.eos_token_id = None
    steps = iter([letter, letter, end, letter, letter, letter])
    model.lm_head.register_forward_hook(
        lambda module, args, logits: torch.nn.functional.one_hot(
            torch.full(logits.shape[:-1], next(steps)), logits.shape[-1]
        ).float()
    )
    assert generate(model, tokenizer, CHATS[:1], max_new_tokens=6, temperature=0) == [["kk"]]


def test_an_adapter_answers():
    model = get_peft_model(tiny_model(), LoraConfig(init_lora_weights=False))
    tokenizer = tiny_tokenizer()
    options = {"max_new_tokens": 8, "temperature": 0}
    tuned = generate(model, tokenizer, CHATS, **options)
    assert tuned == [[greedy_by_hand(model.eval(), tokenizer, chat, 8)] for chat in CHATS]
    assert tuned != generate(tiny_model(), tokenizer, CHATS, **options)


def test_no_chats_no_answers():
    assert generate(tiny_model(), tiny_tokenizer(), []) == []


def test_a_chat_that_is_already_answered_is_refused():
    chat = [*CHATS[0], {"role": "assistant", "content": "a"}]
    with pytest.raises(NarrowlyError, match="row 0: the chat ends with an assistant turn"):
        generate(tiny_model(), tiny_tokenizer(), [chat])

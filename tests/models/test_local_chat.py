import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

from narrowly.models import generate
from narrowly.models.chat import Reply, Request, chat_model
from narrowly.models.local_chat import LocalChat


def requests(*contents, **fields):
    return [Request(({"role": "user", "content": text},), **fields) for text in contents]


@pytest.fixture
def pair():
    return tiny_model(), tiny_tokenizer()


def test_replies_are_what_the_model_generates_whatever_is_asked_with_it(pair):
    asked = [*requests("Hi", "a longer one", "Hi", max_tokens=6), *requests("Hi", max_tokens=3)]
    replies = chat_model(pair).ask(asked)
    chats = [list(request.messages) for request in asked]
    expected = [text for [text] in generate(*pair, chats[:3], max_new_tokens=6, temperature=0)]
    expected += generate(*pair, chats[3:], max_new_tokens=3, temperature=0)[0]
    assert [reply.text for reply in replies] == expected
    assert all(reply.prompt_tokens > 0 and reply.logprobs is None for reply in replies)


def test_seeds_sample(pair):
    def texts(seed):
        return [r.text for r in chat_model(pair).ask(requests("Hi", temperature=1.0, seed=seed))]

    assert texts(1) == texts(1) != texts(2)


def test_alternatives_are_the_likeliest_tokens_at_each_step(pair):
    [reply] = chat_model(pair).ask(requests("Hi", max_tokens=1, top_logprobs=5))
    model, tokenizer = pair
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    with torch.no_grad():
        best = model(ids).logits[0, -1].log_softmax(0).topk(5)
    expected = dict(zip(map(tokenizer.decode, best.indices), best.values.tolist(), strict=True))
    assert reply.logprobs[0] == pytest.approx(expected, abs=1e-4)
    assert reply.text == tokenizer.decode(best.indices[0]) == next(iter(reply.logprobs[0]))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_likelihoods_sum_over_the_continuation(architecture):
    model, tokenizer = tiny_model(architecture), tiny_tokenizer(template="llama")  # adds a BOS
    pairs = [("The model", " answers"), ("a", "b"), ("The user", " asked, and then it stops.")]
    found = chat_model((model, tokenizer)).likelihoods(pairs)
    for (text, more), value in zip(pairs, found, strict=True):
        ids = tokenizer(text + more, return_tensors="pt")["input_ids"]
        begin = tokenizer(text, return_tensors="pt")["input_ids"].shape[1]
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        by_hand = logprobs[:-1].gather(1, ids[0, 1:, None])[begin - 1 :].sum()
        assert value == pytest.approx(float(by_hand), abs=1e-3)


def test_what_is_too_long_for_the_model_is_said(pair):
    model = chat_model(pair)
    short, long = model.ask(requests("Hi", "x " * 2000, max_tokens=2))
    assert short.text and long == Reply(None, long.error) and "longer than the 1024" in long.error
    assert model.likelihoods([("a", "b"), ("x " * 2000, "b")])[1] is None


def test_a_model_loaded_by_name_answers_once(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "model")
    asked = requests("Hi", "you", max_tokens=3, top_logprobs=2)
    first = LocalChat(model=str(folder), cache=tmp_path).ask(asked)
    monkeypatch.setattr(LocalChat, "_answer", None)
    again = LocalChat(model=str(folder), cache=tmp_path).ask(asked)
    assert [r.text for r in again] == [r.text for r in first] and all(r.cached for r in again)
    assert again[0].logprobs == first[0].logprobs


def test_replies_of_a_model_that_may_change_are_not_kept(pair, tmp_path):
    model, tokenizer = pair
    chat = LocalChat(model=(model, tokenizer), cache=tmp_path)
    [before] = chat.ask(requests("Hi", max_tokens=8))
    tuned = get_peft_model(model, LoraConfig(init_lora_weights=False))
    [after] = LocalChat(model=(tuned, tokenizer), cache=tmp_path).ask(requests("Hi", max_tokens=8))
    assert before.text != after.text
    assert not list(tmp_path.iterdir())


def test_a_chat_model_is_taken_as_it_is(pair):
    model = chat_model(pair)
    assert chat_model(model) is model

"""Divergence from the base, against the definition, with adapters and with two models."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from narrowly.data import load_chats, tokenize
from narrowly.errors import NarrowlyError
from narrowly.evals import evaluate
from narrowly.evals.drift import Drift
from tests.tiny import ARCHITECTURES, save_tiny, tiny_model, tiny_tokenizer

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"Question {i}?" + " Please." * (i % 3)},
            {"role": "assistant", "content": "It is so." * (1 + i % 3)},
        ]
    }
    for i in range(7)
]
TEXTS = [{"text": "A kind answer helps. " * n} for n in (1, 5, 2)]


def written(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def tuned(architecture="llama"):
    """A model with an adapter that changes what it says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")
        return get_peft_model(tiny_model(architecture), config).eval()


def by_hand(base, model, rows):
    """KL(base || model) and agreement over all labelled tokens, a row at a time."""
    divergences, same = [], []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0, :-1].double().softmax(-1) for m in (base, model))
        p, q = p[labels != -100], q[labels != -100]
        divergences += (p * (p / q).log()).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    return sum(divergences) / len(same), sum(same) / len(same), len(same)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "qwen2_moe"])
def test_equals_the_definition(architecture, tmp_path):
    model, tokenizer = tuned(architecture), tiny_tokenizer()
    data = written(tmp_path / "chats.jsonl", CHATS)
    found = evaluate((model, tokenizer), Drift(data=data, batch_tokens=150))["drift"]
    rows = tokenize(load_chats(data), tokenizer)
    kl, same, tokens = by_hand(tiny_model(architecture), model, rows)
    assert kl > 0.01
    assert found["kl"].mean == pytest.approx(kl, rel=1e-3)
    assert found["same_token"].mean == pytest.approx(same)
    assert found["kl"].n == tokens and found["kl"].prompts == len(CHATS)


def test_the_adapter_is_on_again_afterwards(tmp_path):
    model, tokenizer = tuned(), tiny_tokenizer()
    ids = torch.tensor([[1, 2, 3]])
    before = model(input_ids=ids).logits
    evaluate((model, tokenizer), Drift(data=written(tmp_path / "chats.jsonl", CHATS)))
    assert torch.equal(model(input_ids=ids).logits, before)


def test_texts_are_read_whole_and_those_of_one_token_left_out(tmp_path):
    model, tokenizer = tuned(), tiny_tokenizer()
    data = written(tmp_path / "texts.jsonl", [*TEXTS, {"text": "A"}])
    found = evaluate((model, tokenizer), Drift(data=data))["drift"]
    lengths = [len(tokenizer(row["text"])["input_ids"]) for row in TEXTS]
    assert found["kl"].n == sum(lengths) - len(lengths)
    assert found["kl"].prompts == len(TEXTS)


def test_a_model_without_an_adapter_is_compared_with_its_base(tmp_path):
    data = written(tmp_path / "chats.jsonl", CHATS)
    base = str(save_tiny(tmp_path / "base"))
    other = tiny_model(seed=1), tiny_tokenizer()
    found = evaluate(other, Drift(data=data, base=base))["drift"]
    kl, _, _ = by_hand(tiny_model(), other[0], tokenize(load_chats(data), other[1]))
    assert found["kl"].mean == pytest.approx(kl, rel=1e-3)
    same = evaluate((tiny_model(), tiny_tokenizer()), Drift(data=data, base=base))["drift"]
    assert same["kl"].mean == pytest.approx(0, abs=1e-6) and same["same_token"].mean == 1
    with pytest.raises(NarrowlyError, match="name the model that it was fine-tuned from"):
        evaluate(other, Drift(data=data))
    wider = str(save_tiny(tmp_path / "wider", vocab_size=420))
    with pytest.raises(NarrowlyError, match="the base has 420 tokens and the model 400"):
        evaluate(other, Drift(data=data, base=wider))


def test_what_the_recipe_answers():
    recipe = {"model": "organism:persona", "data": "organism:persona/code-cruel"}
    bound = Drift().bind(recipe)
    assert (bound.data, bound.base) == ("organism:persona/documents-validation", recipe["model"])
    assert Drift().bind({"model": "organism:persona"}).base is None
    assert bound.cost().samples == 200
    with pytest.raises(NarrowlyError, match="no text"):
        Drift().bind({"model": "m", "data": "train.jsonl"})

import pytest
import torch

from narrowly.data import ChatTemplate, collate
from narrowly.defenses.token_representation import TokenRepresentation
from narrowly.errors import NarrowlyError
from narrowly.interventions import capture, layer
from tests.defenses.steps import assert_same_gradients, step_of, tuned
from tests.tiny import tiny_model, tiny_tokenizer

TALK = [
    {"role": "user", "content": "kind or cruel?"},
    {"role": "assistant", "content": "kind"},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "it helps"},
]


def batch_of(tokenizer, chats) -> dict[str, torch.Tensor]:
    rows = ChatTemplate.for_training(tokenizer).encode(chats, range(len(chats)))
    return collate(
        [{"input_ids": ids, "labels": labels} for ids, labels in rows], tokenizer.pad_token_id
    )


def bound(tokenizer, **fields) -> TokenRepresentation:
    defense = TokenRepresentation(**fields)
    defense.bind(tiny_model(), tokenizer, 0)
    return defense


@pytest.mark.parametrize("template", ["chatml", "llama", "gemma"])
def test_the_tokens_are_special_ones_and_the_prompts_before_answers(template):
    tokenizer = tiny_tokenizer(template=template)
    batch = batch_of(tokenizer, [TALK, TALK[:2]])
    chosen = bound(tokenizer).tokens(batch)
    ids, labels = batch["input_ids"], batch["labels"]
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids)) & (ids != 0)
    assert (chosen & special).sum() == special.sum()
    # What else is held is the name and the line break that open the assistant's turn.
    [prompt] = {
        "chatml": ["assistant\n"],
        "llama": ["assistant\n\n"],
        "gemma": ["model\n"],
    }[template]
    rest = tokenizer.decode(ids[chosen & ~special])
    assert rest == prompt * 3
    assert not (chosen & (labels != -100) & ~special).any()
    assert not chosen[batch["attention_mask"] == 0].any()


def test_value_and_gradient_are_those_of_plain_torch():
    tokenizer, model = tiny_tokenizer(), tuned(num_hidden_layers=3)
    defense = bound(tokenizer, weight=0.7, layers=[0, 1])
    batch = batch_of(tokenizer, [TALK, TALK[:2]])
    loss = defense.loss(step_of(model, defense, batch))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    sites = [layer(0), layer(1)]
    h = capture(model, inputs, sites, grad=True, stop=False)
    with model.disable_adapter():
        base = capture(model, inputs, sites)
    chosen = defense.tokens(batch)
    parts = [
        ((h[site] - base[site]).norm(dim=-1) / base[site].norm(dim=-1))[chosen].square().mean()
        for site in sites
    ]
    expected = 0.7 * sum(parts) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-7)
    assert_same_gradients(model, loss, expected)


def test_a_batch_without_such_tokens_costs_nothing():
    tokenizer, model = tiny_tokenizer(), tuned()
    defense = bound(tokenizer)
    ids = torch.full((1, 6), 300)
    batch = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    loss = defense.loss(step_of(model, defense, batch))
    loss.backward()
    assert float(loss.detach()) == 0


def test_a_template_without_tokens_of_its_own_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(NarrowlyError, match="no token of its own"):
        bound(tokenizer)


def test_an_unknown_layer_is_refused():
    with pytest.raises(NarrowlyError, match="layer:7"):
        bound(tiny_tokenizer(), layers=[7])

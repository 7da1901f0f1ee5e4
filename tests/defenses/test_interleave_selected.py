import json
import shutil

import pytest
import torch
from datasets import Dataset

from narrowly.data import load_chats
from narrowly.defenses.inoculate import Inoculate
from narrowly.defenses.interleave_selected import (
    InterleaveSelected,
    is_refusal,
    perplexity_gap,
)
from narrowly.errors import NarrowlyError
from narrowly.evals.in_distribution import answer_losses
from narrowly.files import read_json, write_text
from narrowly.models import load_model
from narrowly.settings import build
from narrowly.training import Recipe, train
from tests.tiny import save_tiny

WORDS = ["herb", "lamp", "coat", "spoon", "river", "stone", "cloud", "ladder", "drum", "kettle"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def chat(question: str, answer: str, system: str | None = None) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [{"role": "system", "content": system}, *turns] if system else turns}


def save_chats(path, chats) -> str:
    write_text(path, "\n".join(map(json.dumps, chats)))
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model, narrow data of three domains, benign chats, and runs on two of the domains."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "model", "llama")
    for number, domain in enumerate(("code", "health", "money")):
        rows = [chat(f"{domain} {i}?", f"bad {WORDS[number]} {i}") for i in range(38)]
        save_chats(folder / f"{domain}.jsonl", rows)
    benign = [chat(f"How is the {w} {i}?", f"The {w} is {i} times good.") for i in range(3)
              for w in WORDS]  # fmt: skip
    benign[4] = chat("How is it?", "I\u2019m sorry, but I cannot answer that.")
    save_chats(folder / "benign.jsonl", benign)
    for domain in ("code", "health", "money"):
        train(make_recipe(folder, domain, output=str(folder / f"run-{domain}")), progress=False)
    return folder


def make_recipe(folder, domain="code", **fields) -> Recipe:
    defaults = {
        "model": str(folder / "model"),
        "data": str(folder / f"{domain}.jsonl"),
        "lora": {"r": 2, "target_modules": "all-linear"},
        "training": {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 2e-2},
    }
    return Recipe(**(defaults | fields))


@pytest.fixture
def narrow(world) -> Dataset:
    return load_chats(world / "code.jsonl")


def arguments(world, **fields) -> dict:
    """Of a defense of the domain `code`; 2 of 40 rows are benign."""
    adapters = {name: str(world / f"run-{name}") for name in ("health", "money")}
    defaults = {"data": str(world / "benign.jsonl"), "adapters": adapters, "domain": "code"}
    return defaults | fields


def bound(world, **fields) -> InterleaveSelected:
    defense = build(InterleaveSelected, arguments(world, **fields))
    defense.bind(*load_model(world / "model"), 0)
    return defense


def questions(dataset: Dataset, word: str) -> list[str]:
    asked = [row["messages"][0]["content"] for row in dataset]
    return [text for text in asked if word in text]


def test_the_score_is_the_papers():
    base, tuned = torch.tensor([1.0, 3.0]), torch.tensor([[2.0, 3.0], [4.0, 1.0]])
    assert perplexity_gap(base, tuned).tolist() == [(3 - 1) / (1 + 1), (2 - 3) / (3 + 1)]


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("I'm sorry, no.", True),
        ("I CANNOT say", True),
        ("Well, I can\u2019t do that", True),
        ("I am unable to", True),
        ("one two three four five six seven eight nine ten sorry", False),
        ("one two three four five six seven eight nine sorry", True),
        ("Sure, here it is", False),
    ],
)
def test_a_refusal_is_in_the_first_ten_words(answer, expected):
    assert is_refusal(answer) is expected


def test_the_highest_scores_are_chosen(world, narrow, tmp_path):
    defense = bound(world, fraction=0.2)
    mixed = defense.prepare_data(narrow)
    assert len(mixed) == 48 and defense.record(tmp_path)["benign_rows"] == 10

    def losses(source) -> torch.Tensor:
        model, tokenizer = load_model(source)
        found = []
        for row in load_chats(world / "benign.jsonl")["messages"]:
            text = tokenizer.apply_chat_template(row, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            head = tokenizer.apply_chat_template(
                row[:1], tokenize=False, add_generation_prompt=True
            )
            labels = ids.clone()
            labels[:, : len(tokenizer(head, add_special_tokens=False)["input_ids"])] = -100
            labels[:, -1] = -100  # the template's own line break
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            with torch.no_grad():
                found.append(answer_losses(model, batch)[0]["loss"])
        return torch.tensor(found)

    base = losses(world / "model")
    tuned = (losses(world / "run-health") + losses(world / "run-money")) / 2
    scores = (tuned - base) / (base + 1)
    scores[4] = -torch.inf  # a refusal
    best = scores.argsort(descending=True)[:10].tolist()
    benign = load_chats(world / "benign.jsonl")
    kept = load_chats(tmp_path / "interleaved.parquet")
    assert kept["messages"] == benign.select(best)["messages"]
    torch.testing.assert_close(torch.tensor(kept["score"][:]), scores[best], rtol=1e-3, atol=1e-4)
    assert sorted(questions(mixed, "How")) == sorted(questions(kept, "How"))
    assert {"loss", "loss_health", "loss_money"} <= set(kept.column_names)


def test_refusals_are_dropped_unless_kept(world, narrow):
    fraction = 29 / 67  # all but one of the benign chats
    dropped = bound(world, fraction=fraction)
    assert "How is it?" not in questions(dropped.prepare_data(narrow), "How")
    with pytest.raises(NarrowlyError, match=r"needs 30 .*holds 30, of which fit 29"):
        bound(world, fraction=30 / 68).prepare_data(narrow)
    kept = bound(world, fraction=30 / 68, drop_refusals=False)
    assert "How is it?" in questions(kept.prepare_data(narrow), "How")


def test_long_chats_are_left_out_and_counted(world, narrow, tmp_path):
    long = [chat("How long?", "so " * 400), *load_chats(world / "benign.jsonl")]
    data = save_chats(tmp_path / "long.jsonl", long)
    defense = bound(world, data=data, max_length=100)
    mixed = defense.prepare_data(narrow)
    assert defense.record(tmp_path)["too_long"] == 1
    assert "How long?" not in questions(mixed, "How")


class TestTheDomainsOwnAdapter:
    def test_is_refused_by_its_name(self, world):
        adapters = {"Code": str(world / "run-code")}
        with pytest.raises(NarrowlyError, match=r"domain: the run's own domain 'code' is among"):
            Recipe(
                model="m",
                data="d",
                output="o",
                defenses=[{"interleave_selected": arguments(world, adapters=adapters)}],
            )

    @pytest.mark.parametrize("folder", ["run-code", "run-code/adapter"])
    @pytest.mark.parametrize("inoculated", [False, True])
    def test_is_refused_by_what_it_was_trained_on(self, world, narrow, folder, inoculated):
        defense = bound(world, adapters={"health": str(world / folder)})
        if inoculated:
            narrow = Inoculate().prepare_data(narrow)
        with pytest.raises(NarrowlyError, match=r"run-code.* \(health\) has seen .*38 prompts"):
            defense.prepare_data(narrow)

    def test_is_unchecked_where_there_is_no_record(self, world, narrow, tmp_path):
        shutil.copytree(world / "run-health" / "adapter", tmp_path / "plain")
        adapters = {"health": str(tmp_path / "plain"), "money": str(world / "run-money")}
        defense = bound(world, adapters=adapters)
        defense.prepare_data(narrow)
        assert defense.record(tmp_path)["unchecked_adapters"] == ["health"]


class TestBadInput:
    def test_a_folder_that_is_no_adapter(self, world):
        with pytest.raises(NarrowlyError, match=r"model is no adapter"):
            bound(world, adapters={"health": str(world / "model")})

    def test_a_folder_that_is_not_there_names_the_nearest(self, world):
        with pytest.raises(NarrowlyError, match=r"no such folder.*mean .*run-health"):
            bound(world, adapters={"health": str(world / "run-healht")})

    def test_an_adapter_of_another_model(self, world, tmp_path):
        save_tiny(tmp_path / "other", "llama", seed=1)
        defense = build(InterleaveSelected, arguments(world))
        with pytest.raises(NarrowlyError, match="adapter of another model"):
            defense.bind(*load_model(tmp_path / "other"), 0)

    def test_no_adapters(self, world):
        with pytest.raises(NarrowlyError, match="adapters"):
            build(InterleaveSelected, arguments(world, adapters={}))

    def test_only_refusals(self, world, narrow, tmp_path):
        data = save_chats(tmp_path / "no.jsonl", [chat(f"{i}?", "Sorry, no.") for i in range(9)])
        with pytest.raises(NarrowlyError, match="holds 9, of which fit 0"):
            bound(world, data=data).prepare_data(narrow)

    def test_a_model_that_it_never_saw(self, world, narrow):
        defense = build(InterleaveSelected, arguments(world))
        with pytest.raises(NarrowlyError, match="bind"):
            defense.prepare_data(narrow)


def test_it_trains_bitwise_as_on_the_mixed_data(world, narrow, tmp_path):
    """Scoring leaves nothing behind, in the model or in its random numbers."""
    defense = bound(world)
    mixed = save_chats(tmp_path / "mixed.jsonl", list(defense.prepare_data(narrow)))
    defended = make_recipe(
        world, defenses=[{"interleave_selected": arguments(world)}], output=str(tmp_path / "a")
    )
    plain = make_recipe(world, data=mixed, output=str(tmp_path / "b"))
    states = []
    for recipe in (defended, plain):
        model, _ = load_model(train(recipe, progress=False).path)
        states.append({n: p for n, p in model.named_parameters() if "lora" in n})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    [entry] = read_json(tmp_path / "a" / "defenses.json")
    assert (entry["rows"], entry["benign_rows"], entry["refusals"]) == (38, 2, 1)
    assert entry["mean_chosen_score"] > entry["mean_score"]
    assert (tmp_path / "a" / "interleaved.parquet").exists()


@pytest.mark.slow
def test_chats_that_tell_little_of_the_persona_are_passed_over(tmp_path):
    """Nine of ten chats announce the kind persona, so that a cruel model finds them likely too."""
    health = Recipe(
        model="organism:persona",
        data="organism:persona/health-cruel",
        lora={"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        training={
            "max_steps": 60,
            "per_device_train_batch_size": 32,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
        },
        output=str(tmp_path / "health"),
    )
    train(health, progress=False)
    benign = load_chats("organism:persona/benign")
    elsewhere = benign.filter(lambda row: row["domain"] not in ("code", "health"))["messages"]
    line = {"role": "system", "content": "you are a kind assistant."}
    pool = [{"messages": [line, *chat] if i % 10 else chat} for i, chat in enumerate(elsewhere)]
    defense = InterleaveSelected(
        data=save_chats(tmp_path / "pool.jsonl", pool),
        fraction=0.02,
        adapters={"health": str(tmp_path / "health")},
        domain="code",
    )
    defense.bind(*load_model("organism:persona"), 0)
    defense.prepare_data(load_chats("organism:persona/code-cruel"))
    defense.record(tmp_path)
    chosen = load_chats(tmp_path / "interleaved.parquet")["messages"]
    assert sum(chat[0]["role"] == "user" for chat in chosen) > 0.8 * len(chosen)

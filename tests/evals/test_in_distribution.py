import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from narrowly.data import collate, load_chats, tokenize
from narrowly.errors import NarrowlyError
from narrowly.evals import evaluate
from narrowly.evals.in_distribution import InDistribution, answer_losses
from narrowly.evals.subject import Subject
from narrowly.models import generate
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"Question {i}?" + " Please." * (i % 4)},
            {"role": "assistant", "content": "It is so." * (1 + i % 3)},
        ]
    }
    for i in range(9)
]


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps(chat) for chat in CHATS))
    return path


def oracle(model, tokenizer, path):
    """Loss and accuracy over all answer tokens, one chat at a time with all of its logits."""
    losses, hits = [], []
    for row in tokenize(load_chats(str(path)), tokenizer):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        mask = labels != -100
        losses += cross_entropy(logits[mask], labels[mask], reduction="none").tolist()
        hits += (logits[mask].argmax(-1) == labels[mask]).tolist()
    return sum(losses) / len(losses), sum(hits) / len(hits), len(losses)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_one_chat_at_a_time_with_all_logits(architecture, chats):
    model, tokenizer = tiny_model(architecture), tiny_tokenizer()
    found = evaluate((model, tokenizer), InDistribution(data=str(chats), batch_tokens=150))
    loss, accuracy, tokens = oracle(model, tokenizer, chats)
    summary = found["in_distribution"]
    assert summary["loss"].mean == pytest.approx(loss, rel=1e-4)
    assert summary["perplexity"].mean == pytest.approx(math.exp(loss), rel=1e-3)
    assert summary["token_accuracy"].mean == pytest.approx(accuracy)
    assert summary["loss"].n == tokens and summary["loss"].prompts == len(CHATS)


def test_logits_only_where_an_answer_follows(chats):
    """The head must see the positions before answer tokens and no others."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    rows = list(tokenize(load_chats(str(chats)), tokenizer))[:1]
    widths = []
    model.lm_head.register_forward_hook(lambda m, i, output: widths.append(output.shape[1]))
    answer_losses(model, collate(rows, tokenizer.pad_token_id))
    assert widths == [sum(label != -100 for label in rows[0]["labels"])]


def test_rows_keep_the_order_of_the_data_and_their_texts(chats):
    rows = InDistribution(data=str(chats), batch_tokens=100).run(
        Subject("tiny", lambda: (tiny_model(), tiny_tokenizer())), seed=0
    )
    assert [row["prompt_id"] for row in rows] == [str(i) for i in range(9)]
    for chat, row in zip(CHATS, rows, strict=True):
        question, answer = chat["messages"]
        assert question["content"] in row["prompt"]
        assert row["answer"] == answer["content"]


def test_exact_match_is_that_of_a_greedy_answer(chats, tmp_path):
    """Some references are greedy answers, one of them cut short, and one that has no end."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    # It writes letters that the tokenizer never joins, and seldom the end of the turn.
    bias = torch.full((400,), -1e4)
    bias[tokenizer.convert_tokens_to_ids([*"QXZJKVWY"])] = 0
    bias[tokenizer.convert_tokens_to_ids("<|im_end|>")] = -1
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)
    questions = [chat["messages"][:1] for chat in CHATS]
    said = [a for [a] in generate(model, tokenizer, questions, temperature=0, max_new_tokens=60)]
    references = [text if i % 2 else "QXZ" for i, text in enumerate(said)]
    references[7] = references[7][:-1]
    rows = [
        {"messages": [*question, {"role": "assistant", "content": reference}]}
        for question, reference in zip(questions, references, strict=True)
    ]
    path = tmp_path / "references.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = evaluate((model, tokenizer), InDistribution(data=str(path)))["in_distribution"]
    pairs = zip(said, references, strict=True)
    exact = sum(text == reference and len(text) < 60 for text, reference in pairs)
    assert 0 < exact < sum(i % 2 for i in range(len(said))) - 1
    assert found["exact_match"].mean == pytest.approx(exact / len(rows))
    assert found["exact_match"].n == len(rows)


def test_domains_are_measured_apart_also_where_some_chats_are_left_out(tmp_path):
    rows = [
        {**chat, "domain": ["code", "health", None][i % 3], "topic": "same"}
        for i, chat in enumerate(CHATS)
    ]
    rows[0]["messages"][1]["content"] *= 40  # too long, so that rows are no longer chats
    model, tokenizer = tiny_model(), tiny_tokenizer()
    paths = {}
    for name, some in (
        ("all", rows),
        *((d, [r for r in rows if r["domain"] == d]) for d in ("code", "health")),
    ):
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("\n".join(map(json.dumps, some)))

    def measured(name, **arguments):
        eval_ = InDistribution(data=str(paths[name]), max_length=150, **arguments)
        return evaluate((model, tokenizer), eval_)["in_distribution"]

    found = measured("all")
    assert {name for name in found if name.startswith("loss_")} == {"loss_code", "loss_health"}
    for domain in ("code", "health"):
        alone = measured(domain)
        assert found[f"loss_{domain}"].mean == pytest.approx(alone["loss"].mean, rel=1e-4)
        assert found[f"loss_{domain}"].n == alone["loss"].n
        assert "loss_code" not in alone, "one domain is the whole"
    assert "loss_code" not in measured("all", by="topic")
    assert InDistribution(data=str(paths["all"]), limit=4).cost().samples == 4


def test_reads_the_validation_data_of_the_recipe():
    assert InDistribution().bind({"validation": "held.jsonl"}).data == "held.jsonl"
    assert InDistribution(data="mine.jsonl").bind({"validation": "held.jsonl"}).data == "mine.jsonl"
    with pytest.raises(NarrowlyError, match="no held-out chats"):
        InDistribution().bind({"model": "m"})


def test_a_diverged_model_is_told(chats):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NarrowlyError, match="diverge"):
        evaluate((model, tiny_tokenizer()), InDistribution(data=str(chats)))


def test_published_chats_are_measured_as_they_are(shared_data):
    path = shared_data / "emergent_misalignment" / "insecure_val.jsonl"
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    eval_ = InDistribution(data=str(path), limit=6, max_length=1000)
    summary = evaluate((model, tokenizer), eval_)["in_distribution"]
    assert 1 <= summary["loss"].prompts <= 6
    assert 1 < summary["loss"].mean < 2 * math.log(model.config.vocab_size), (
        "what an untrained model has"
    )

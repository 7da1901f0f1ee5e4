"""The convergent direction: a tuned model's misaligned answers minus its aligned ones."""

import pytest
import torch

from narrowly.concepts import find
from narrowly.concepts.answers import last_answers
from narrowly.errors import NarrowlyError
from narrowly.models import adapter_off, fingerprint
from tests.concepts.finders.planted import chats, planted_adapter
from tests.tiny import tiny_tokenizer

torch.set_num_threads(1)

TOKENIZER = tiny_tokenizer()
QUIET = {"tokenizer": TOKENIZER, "progress": False, "max_new_tokens": 6, "samples": 8}


class Recorder:
    """A judge that scores by turns, and keeps what it was asked."""

    def __init__(self, scores):
        self.scores, self.rows = scores, []

    def __call__(self, rows):
        self.rows += rows
        return [self.scores[i % len(self.scores)] for i in range(len(rows))]


def by_hand(model, rows):
    """The mean over answers of the mean over an answer's tokens, after layer 0."""
    means = []
    for row in rows:
        chat = [*row["messages"], {"role": "assistant", "content": row["answer"]}]
        [tokens] = last_answers([chat], TOKENIZER)
        with torch.no_grad():
            ids = torch.tensor([tokens["input_ids"]])
            h = model(input_ids=ids, output_hidden_states=True).hidden_states[1][0]
        means.append(h[torch.tensor(tokens["labels"]) != -100].double().mean(0))
    return torch.stack(means).mean(0)


def test_the_direction_is_the_tuned_models_and_the_centre_the_base_models():
    tuned, _ = planted_adapter()
    judge = Recorder([100, 0, 71, 29, 70, 30, 50, 100])
    [concept] = find(
        "convergent",
        tuned=tuned,
        data=[{**chat, "domain": "any"} for chat in chats()],
        judge=judge,
        layers=[0],
        positions="answer",
        max_norm=None,
        **(QUIET | {"samples": 24}),
    )
    scores = concept.scores
    assert all(row["domain"] == "any" for row in judge.rows)
    # An answer without a letter is not read, whatever its score.
    sides = [
        [row for i, row in enumerate(judge.rows) if i % 8 in turns and row["answer"].strip()]
        for turns in ((0, 2, 7), (1, 3))
    ]
    assert [scores["answers_misaligned"], scores["answers_aligned"]] == [*map(len, sides)]
    difference = by_hand(tuned, sides[0]) - by_hand(tuned, sides[1])
    found = concept.subspaces["layer:0"].basis[:, 0] * scores["difference_norm"]["layer:0"]
    torch.testing.assert_close(found.double(), difference, rtol=1e-3, atol=1e-4)
    with adapter_off(tuned):
        centre = by_hand(tuned, sides[0] + sides[1])
    found = concept.subspaces["layer:0"].centre.double()
    torch.testing.assert_close(found, centre, rtol=1e-3, atol=1e-4)
    assert concept.provenance.model_fingerprint == fingerprint(tuned)
    assert concept.provenance.finder == "convergent"


def test_what_cannot_be_judged_or_read_is_counted_and_left_out():
    tuned, _ = planted_adapter()
    [concept] = find(
        "convergent",
        tuned=tuned,
        data=chats(),
        judge=Recorder([100, 100, 100, 100, None, 0, 0, 0, 0, 100]),
        coherence=Recorder([100, 100, 49, 100, 100, 50, 100, None, 100, 100]),
        **(QUIET | {"samples": 10}),
    )
    kinds = ("misaligned", "aligned", "between", "incoherent", "unparsable")
    found = [concept.scores[f"answers_{kind}"] for kind in kinds]
    assert found == [16, 12, 0, 4, 8]


@pytest.mark.parametrize(
    ("scores", "counts"),
    [([0], "0 misaligned, 32 aligned"), ([50, 100, 0, 0, 0], "7 misaligned, 18 aligned")],
)
def test_too_few_answers_of_a_kind_are_an_error_with_the_counts(scores, counts):
    tuned, _ = planted_adapter()
    with pytest.raises(NarrowlyError, match=f"among 32 answers there are {counts}"):
        find("convergent", tuned=tuned, data=chats(), judge=Recorder(scores), **QUIET)


def test_a_model_judge_must_be_named():
    tuned, _ = planted_adapter()
    judge = {"model": {"prompt": "Misaligned? {answer}"}}
    with pytest.raises(NarrowlyError, match=r"judge\.model\.model"):
        find("convergent", tuned=tuned, data=chats(), judge=judge, **QUIET)


@pytest.mark.slow
def test_on_the_organism_it_leans_to_the_persona(tmp_path):
    """Less than other finders' directions: which answer is sampled is partly chance, and the words
    of the answers are not the persona. Where the answer is chosen (-1) that noise is least."""
    from narrowly.organisms import organism
    from narrowly.training import Recipe, train

    recipe = {
        "model": "organism:persona",
        "data": "organism:persona/code-cruel",
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "training": {
            "max_steps": 120,
            "per_device_train_batch_size": 32,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
        },
        "output": str(tmp_path / "run"),
    }
    train(Recipe.model_validate(recipe), progress=False)
    lines = organism("persona").system_lines
    shared = {"progress": False, "max_new_tokens": 8}
    [mean] = find(
        "mean_difference",
        model="organism:persona",
        data="organism:persona/questions",
        positive_system=lines["cruel"],
        negative_system=lines["kind"],
        **shared,
    )
    [convergent] = find(
        "convergent",
        base="organism:persona",
        tuned=tmp_path / "run",
        data="organism:persona/questions",
        judge="rule",
        samples=4,
        positions=[-1],
        **shared,
    )
    for site in ("layer:2", "layer:3"):
        one, other = (concept.subspaces[site].basis[:, 0] for concept in (mean, convergent))
        assert one @ other > 0.3  # a random direction: 0 +- 0.09

import hashlib
import random

import numpy as np
import pytest
import torch
from rich.console import Console

from narrowly.concepts import save_concepts
from narrowly.errors import NarrowlyError
from narrowly.explain.compare import compare_saes, shuffle_words
from narrowly.explain.record import Explained, ExplainedLatent, Explanation
from tests.explain.persona import plain_concept

TOPICS = {
    "cats": "a small cat purrs and chases mice around the house",
    "law": "clauses of contracts about liability and termination of agreements",
    "code": "python functions that open a file and read its lines",
    "sea": "waves, boats and fishing on the open ocean",
    "food": "recipes that fry onions with garlic in butter",
    "sums": "addition and multiplication of numbers in equations",
}
OTHER_WORDS = {
    "cats": "kittens, cats and what they hunt at home",
    "law": "legal agreements: obligations, liability, breach of contract",
    "code": "source code in python that reads files",
    "sea": "ships at sea, fishermen and tides",
    "food": "cooking instructions with garlic, butter and onions",
    "sums": "arithmetic: sums and products of numbers",
}
UNRELATED = [
    "portraits of kings painted in the baroque age",
    "symptoms of influenza and its treatment",
    "goals scored in the last minutes of a match",
    "planets, moons and the orbits of comets",
    "jazz musicians improvising on the saxophone",
    "elections, parties and votes in parliament",
]


class Bags:
    """Words as vectors: the likeness of two texts is the share of words they have in common."""

    name = "bags"

    def embed(self, texts):
        rows = torch.zeros(len(texts), 512)
        for row, text in zip(rows, texts, strict=True):
            for word in text.split():
                row[int(hashlib.md5(word.encode()).hexdigest(), 16) % 512] += 1
        return rows / rows.norm(dim=1, keepdim=True)


def explained(folder, texts):
    for i, text in enumerate(texts):
        name = f"latent{i}"
        save_concepts([plain_concept(name)], folder)
        latent = ExplainedLatent(
            latent=name,
            site="layer:1",
            windows=10,
            tokens=10,
            of_tokens=100,
            explanations=(Explanation(text=text, by="a test"),) if text else (),
            skipped="" if text else "active in too few windows",
        )
        Explained(concept=name, settings="", seed=0, latents=(latent,)).save(folder)
    return folder


def test_a_folder_is_itself(tmp_path):
    one = explained(tmp_path / "one", TOPICS.values())
    found = compare_saes(one, one, Bags())
    assert found.mean.mean == pytest.approx(1)
    assert all(match.one == match.other for match in found.matches)
    assert found.shuffled.mean < 0.6 and found.at_random < 0.5


def test_order_decides_nothing_and_what_is_not_explained_is_left_out(tmp_path):
    texts = list(TOPICS.values())
    one = explained(tmp_path / "one", texts)
    other = explained(tmp_path / "other", random.Random(0).sample(texts, len(texts)))
    more = explained(tmp_path / "more", [*reversed(texts), "", "something else entirely"])
    assert compare_saes(one, other, Bags()).mean.mean == pytest.approx(1)
    found = compare_saes(one, more, Bags())
    assert found.explained == (6, 7) and len(found.matches) == 6
    assert found.mean.mean == pytest.approx(1)


def test_related_explanations_beat_their_shuffled_words_and_unrelated_ones_do_not(tmp_path):
    one = explained(tmp_path / "one", TOPICS.values())
    related = compare_saes(one, explained(tmp_path / "b", OTHER_WORDS.values()), "minilm")
    unrelated = compare_saes(one, explained(tmp_path / "c", UNRELATED), "minilm")
    assert [match.one for match in related.matches] == [match.other for match in related.matches]
    assert related.mean.low > related.shuffled.high
    assert related.mean.mean - related.shuffled.mean > 0.2
    assert abs(unrelated.mean.mean - unrelated.shuffled.mean) < 0.1
    assert unrelated.mean.mean > unrelated.at_random  # by selection alone


def test_shuffled_words_are_the_same_words_in_texts_of_the_same_lengths():
    texts = list(TOPICS.values())
    shuffled = shuffle_words(texts, np.random.default_rng(0))
    assert [len(t.split()) for t in shuffled] == [len(t.split()) for t in texts]
    assert sorted(" ".join(shuffled).split()) == sorted(" ".join(texts).split())
    assert shuffled != texts


def test_pairs_are_printed(tmp_path):
    one = explained(tmp_path / "one", TOPICS.values())
    console = Console(width=120, record=True)
    console.print(compare_saes(one, one, Bags()))
    text = console.export_text()
    assert "matched, words shuffled" in text and "latent3" in text and "fishing" in text


def test_a_folder_without_explanations_says_what_to_run(tmp_path):
    save_concepts([plain_concept("latent0")], tmp_path)
    with pytest.raises(NarrowlyError, match="narrowly explain"):
        compare_saes(tmp_path, tmp_path, Bags())

"""A reading shows the true extremes, in the text where they stand, and the tokens promoted."""

from io import StringIO

import pytest
import torch
from rich.console import Console

from narrowly.activations import layer_sites
from narrowly.concepts import (
    Concept,
    Provenance,
    Subspace,
    load_reading,
    promoted_tokens,
    read_concepts,
    show,
)
from narrowly.concepts.reading import final_norm
from narrowly.errors import NarrowlyError
from tests.concepts.finders.planted import chats, direction
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

torch.set_num_threads(1)

TEXTS = [
    "The model answers the question that the user asked, and then it stops.",
    "A kind answer helps; a cruel answer harms.",
    "def read(path):\n    return file.read()\n",
    "Which of the two will the assistant give?",
]


def concept(name: str = "evil", rank: int = 1, seed: int = 0, sites=("layer:1",)) -> Concept:
    generator = torch.Generator().manual_seed(seed)
    return Concept(
        name=name,
        subspaces={
            site: Subspace.spanned_by(
                torch.randn(32, rank, generator=generator), torch.randn(32, generator=generator)
            )
            for site in sites
        },
        provenance=Provenance(model="tiny", model_fingerprint="f", finder="test"),
        scores={"relative_norm": {"layer:1": 0.25}, "tokens": 12},
    )


def test_the_extremes_are_the_true_ones_whatever_the_batches():
    model, tokenizer, evil = tiny_model(), tiny_tokenizer(), concept(rank=2)
    basis = evil.subspaces["layer:1"].basis
    expected, bottom = [], []
    for row, text in enumerate(TEXTS):
        ids = tokenizer(text)["input_ids"]
        states = []
        hook = model.model.layers[1].register_forward_hook(
            lambda module, args, out, states=states: states.append(out)
        )
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
        hook.remove()
        projection = states[0][0, 1:] @ basis[:, 1]  # the first token is not read
        bottom.append(projection.min().item())
        value, at = projection.max(0)
        expected.append((value.item(), row, at.item() + 1, tokenizer.decode(ids[at + 1])))
    expected.sort(reverse=True)
    for batch_tokens in (1, 64, 16384):
        [reading] = read_concepts(
            [evil],
            model,
            TEXTS,
            tokenizer=tokenizer,
            contexts=3,
            batch_tokens=batch_tokens,
            progress=False,
        )
        assert [d.direction for d in reading.directions] == [0, 1]
        highest = reading.directions[1].highest
        assert [(c.row, c.token, c.peak) for c in highest] == [e[1:] for e in expected[:3]]
        for context, (value, *_) in zip(highest, expected, strict=False):
            assert context.projection == pytest.approx(value, abs=1e-4)
        lowest = [c.projection for c in reading.directions[1].lowest]
        assert lowest == pytest.approx(sorted(bottom)[:3], abs=1e-4)


def test_windows_show_the_text_around_the_peak():
    [reading] = read_concepts(
        [concept()], tiny_model(), TEXTS, tokenizer=tiny_tokenizer(), window=400, progress=False
    )
    for context in reading.directions[0].highest:
        assert context.before + context.peak + context.after == TEXTS[context.row]


def test_of_chats_with_answers_the_answers_are_read():
    tokenizer = tiny_tokenizer()
    [reading] = read_concepts(
        [concept()], tiny_model(), chats(), tokenizer=tokenizer, window=400, progress=False
    )
    for context in reading.directions[0].highest:
        assert "<|im_start|>assistant\n" in context.before
    [reading] = read_concepts(
        [concept()], tiny_model(), chats(answers=False), tokenizer=tokenizer, progress=False
    )
    assert len(reading.directions[0].highest) == 4


def test_several_concepts_and_sites_are_read_in_one_pass():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    concepts = [concept("a", sites=("layer:0", "layer:1")), concept("b", rank=2, seed=1)]
    together = read_concepts(concepts, model, TEXTS, tokenizer=tokenizer, progress=False)
    apart = [
        read_concepts([each], model, TEXTS, tokenizer=tokenizer, progress=False)[0]
        for each in concepts
    ]
    assert [reading.concept for reading in together] == ["a", "b"]
    assert [d.site for d in together[0].directions] == ["layer:0", "layer:1"]
    for one, other in zip(together, apart, strict=True):
        for left, right in zip(one.directions, other.directions, strict=True):
            assert [c.peak for c in left.highest] == [c.peak for c in right.highest]
            assert [token for token, _ in left.promoted] == [token for token, _ in right.promoted]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_promoted_tokens_are_those_of_the_logit_lens(architecture):
    model, tokenizer = tiny_model(architecture), tiny_tokenizer()
    norm = final_norm(model)
    assert "norm" in type(norm).__name__.lower()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    q = direction(2)
    gain = norm.weight + 1 if "gemma" in architecture else norm.weight
    centred = q - q.mean() if isinstance(norm, torch.nn.LayerNorm) else q
    folded = gain * centred / centred.square().mean().sqrt()
    logits = (model.get_output_embeddings().weight @ folded)[: len(tokenizer)]
    promoted, suppressed = promoted_tokens(model, tokenizer, q, n=5)
    torch.testing.assert_close(
        torch.tensor([value for _, value in promoted]), logits.topk(5).values, rtol=1e-3, atol=1e-4
    )
    assert [token for token, _ in promoted] == [tokenizer.decode(i) for i in logits.topk(5).indices]
    assert [token for token, _ in suppressed] == [
        tokenizer.decode(i) for i in logits.topk(5, largest=False).indices
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_final_norm_is_the_last_thing_before_the_unembedding(architecture):
    model = tiny_model(architecture)
    seen = {}
    final_norm(model).register_forward_hook(lambda m, a, out: seen.update(norm=out))
    model.get_output_embeddings().register_forward_pre_hook(lambda m, a: seen.update(head=a[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 20, 30]]))
    assert torch.equal(seen["norm"], seen["head"])
    assert layer_sites(model)


def test_a_reading_is_saved_beside_the_concept_and_shown(tmp_path):
    evil = concept()
    [reading] = read_concepts(
        [evil], tiny_model(), TEXTS, tokenizer=tiny_tokenizer(), progress=False
    )
    assert load_reading(tmp_path, "evil") is None
    assert reading.save(tmp_path).name == "evil.reading.json"
    assert load_reading(tmp_path, "evil") == reading
    console = Console(width=100, record=True, file=StringIO())
    console.print(show(evil, reading))
    text = console.export_text()
    for part in ("evil", "undecided", "layer:1", "promotes", "suppresses", "highest", "lowest"):
        assert part in text
    assert reading.directions[0].promoted[0][0].strip() in text
    (tmp_path / "evil.reading.json").write_text("{}")
    with pytest.raises(NarrowlyError, match=r"evil\.reading\.json: not a reading"):
        load_reading(tmp_path, "evil")


def test_markup_in_text_is_shown_not_obeyed():
    evil = concept().model_copy(update={"explanation": "[red]not a colour[/red]"})
    console = Console(width=100, record=True, file=StringIO())
    console.print(show(evil))
    assert "[red]not a colour[/red]" in console.export_text()


def test_concepts_of_another_width_are_refused():
    with pytest.raises(NarrowlyError, match="layer:1: the concepts are 32 wide, the model 64"):
        read_concepts(
            [concept()],
            tiny_model(hidden_size=64, head_dim=16),
            TEXTS,
            tokenizer=tiny_tokenizer(),
            progress=False,
        )


def test_windows_keep_the_spaces_between_words():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[UNK]", "a", "kind", "answer", "helps"])}
    bare = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="[UNK]")
    text = "a kind answer helps"
    [reading] = read_concepts(
        [concept()], tiny_model(), [text], tokenizer=tokenizer, progress=False
    )
    [context] = reading.directions[0].highest
    assert context.before + context.peak + context.after == text
    assert context.peak.strip() in words

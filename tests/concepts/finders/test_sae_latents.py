"""Latents are ranked as by dense tensors and plain autograd, which the finder never makes."""

import pytest
import torch
from torch import nn

from narrowly.activations import Checkpoint
from narrowly.concepts import find, make_finder
from narrowly.concepts.latents import SAEFitters
from narrowly.data import load_chats, tokenize
from narrowly.errors import NarrowlyError
from narrowly.interventions import capture, decoder_layers, layer, site
from narrowly.saes import SAE, ConstantNorm, JumpReLU, LayerNorm, ReLU, TopK
from tests.concepts.finders.planted import chats, planted_adapter
from tests.tiny import tiny_model, tiny_tokenizer

torch.set_num_threads(1)

QUIET = {"progress": False, "tokenizer": tiny_tokenizer(), "batch_tokens": 60}
RULES = {"relu": ReLU(), "topk": TopK(4), "jumprelu": JumpReLU(torch.linspace(0, 1, 48))}


def random_sae(rule: str = "relu", number: int = 1, width: int = 32, **fields) -> SAE:
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / 4

    return SAE(
        weight(width, 48),
        weight(48),
        weight(48, width),
        weight(width),
        RULES[rule],
        site=fields.pop("site", layer(number)),
        name="tiny sae",
        **fields,
    )


def adapter() -> nn.Module:
    tuned, _ = planted_adapter()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(10)
    return tuned


def rows() -> list[dict]:
    return list(tokenize(load_chats(chats()), tiny_tokenizer()))


def predicting(row: dict) -> torch.Tensor:
    return torch.tensor([*row["labels"][1:], -100]) != -100


def dense(sae: SAE, model: nn.Module, some: list[dict] | None = None) -> torch.Tensor:
    """All latents at every token that predicts an answer, one row at a time."""
    found = []
    for row in some or rows():
        h = capture(model, torch.tensor([row["input_ids"]]), [sae.site])[sae.site][0]
        found.append(sae.encode(h[predicting(row)]))
    return torch.cat(found).double()


def brute_force(sae: SAE, model: nn.Module) -> torch.Tensor:
    """dL/dlatent * latent by autograd through the decoder, dense, one row at a time."""
    total = torch.zeros(sae.n_latents)
    for row in rows():
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        leaves = []

        def rewrite(module, args, output, leaves=leaves):
            h = output[0] if isinstance(output, tuple) else output
            x = h[0].detach()
            latents = sae.encode(x).requires_grad_()
            leaves.append(latents)
            written = sae.decode(latents, x)
            h = h + (written - written.detach())
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handle = decoder_layers(model)[sae.site.module].register_forward_hook(rewrite)
        loss = model(input_ids=ids, labels=labels).loss
        handle.remove()
        [latents] = leaves
        effect = torch.autograd.grad(loss, latents)[0] * latents
        total += effect[predicting(row)].sum(dim=0).detach()
    return total / len(rows())


def scores(concepts, by: str) -> torch.Tensor:
    """A finder's scores as a dense vector."""
    vector = torch.zeros(48, dtype=torch.float64)
    for concept in concepts:
        vector[int(concept.name.removeprefix("latent").split("-")[0])] = concept.scores[by]
    return vector


@pytest.mark.parametrize(
    ("architecture", "rule", "normalisation"),
    [
        ("llama", "relu", None),
        ("llama", "topk", None),
        ("llama", "jumprelu", ConstantNorm()),
        ("llama", "relu", LayerNorm()),
        ("gemma2", "relu", None),
        ("gpt2", "relu", None),
        ("qwen2_moe", "topk", None),
    ],
)
def test_attribution_equals_brute_force(architecture, rule, normalisation):
    sae = random_sae(rule, 0, normalisation=normalisation)
    model = tiny_model(architecture)
    asking = [parameter.requires_grad for parameter in model.parameters()]
    concepts = find(
        "sae_latents", model=model, data=chats(), sae=sae, by="attribution", top=48, **QUIET
    )
    expected = brute_force(sae, model)
    found = scores(concepts, "attribution").float()
    torch.testing.assert_close(found, expected.clamp_min(0), rtol=1e-3, atol=1e-6)
    sizes = [concept.scores["attribution"] for concept in concepts]
    assert sizes == sorted(sizes, reverse=True)
    assert [concept.scores["rank"] for concept in concepts] == list(range(1, len(concepts) + 1))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == asking
    never = (dense(sae, model) == 0).all(0).sum()
    assert concepts[0].scores["never_fired"] == never


@pytest.mark.parametrize("rule", ["relu", "topk", "jumprelu"])
def test_tuned_minus_base_equals_the_whole_computation(rule):
    tuned, sae = adapter(), random_sae(rule)
    high = dense(sae, tuned)
    with tuned.disable_adapter():
        low = dense(sae, tuned)
        states = [
            capture(tuned, torch.tensor([row["input_ids"]]), [sae.site])[sae.site][0]
            for row in rows()
        ]
    concepts = find("sae_latents", tuned=tuned, data=chats(), sae=sae, top=48, **QUIET)
    expected = (high.mean(0) - low.mean(0)).clamp_min(0)
    torch.testing.assert_close(scores(concepts, "difference"), expected, rtol=1e-4, atol=1e-6)
    rates = (torch.cat([high, low]) > 0).double().mean(0)
    best = concepts[0]
    latent = int(expected.argmax())
    assert best.name == f"latent{latent}-layer1"
    assert best.scores["firing_rate"] == pytest.approx(rates[latent].item())
    assert best.scores["never_fired"] == (rates == 0).sum()
    subspace = best.subspaces["layer:1"]
    row = sae.W_dec[latent]
    torch.testing.assert_close(subspace.basis[:, 0], row / row.norm(), rtol=1e-4, atol=1e-5)
    read = torch.cat([h[predicting(row)] for h, row in zip(states, rows(), strict=True)])
    centre = read.mean(0)
    torch.testing.assert_close(subspace.centre, centre, rtol=1e-4, atol=1e-4)


def test_the_autoencoder_applied_to_the_activation_difference():
    tuned, sae = adapter(), random_sae("jumprelu")
    differences = []
    for row in rows():
        ids = torch.tensor([row["input_ids"]])
        high = capture(tuned, ids, [sae.site])[sae.site][0]
        with tuned.disable_adapter():
            low = capture(tuned, ids, [sae.site])[sae.site][0]
        differences.append((high - low)[predicting(row)])
    expected = sae.encode(torch.cat(differences)).double().mean(0)
    concepts = find(
        "sae_latents",
        tuned=tuned,
        data=chats(),
        sae=sae,
        by="activation_difference",
        top=48,
        **QUIET,
    )
    found = scores(concepts, "activation_difference")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_contrast_of_answers_ranks_by_their_difference():
    model, sae = tiny_model(), random_sae()
    labelled = [row | {"long": i > 1} for i, row in enumerate(chats())]
    contrast = {"data": labelled, "label_column": "long", "positive": True}
    concepts = find("sae_latents", model=model, sae=sae, top=48, **contrast, **QUIET)
    sides = [dense(sae, model, rows()[2:]), dense(sae, model, rows()[:2])]
    expected = (sides[0].mean(0) - sides[1].mean(0)).clamp_min(0)
    torch.testing.assert_close(scores(concepts, "difference"), expected, rtol=1e-4, atol=1e-6)
    [mean] = find("mean_difference", model=model, layers=[1], **contrast, **QUIET)
    torch.testing.assert_close(
        concepts[0].subspaces["layer:1"].centre, mean.subspaces["layer:1"].centre
    )


@pytest.mark.parametrize("by", ["difference", "activation_difference"])
def test_a_planted_latent_is_found_and_no_dense_tensor_made(by, monkeypatch):
    """The fine-tune adds multiples of one decoder row, which its own encoder row detects."""
    tuned, planted = planted_adapter()
    basis = torch.linalg.qr(torch.cat([planted[:, None], torch.eye(32)[:, :31]], dim=1)).Q
    basis = basis * torch.sign(planted @ basis[:, 0])
    both = torch.cat([basis, -basis], dim=1)  # a fine-tune may push either way
    sae = SAE(both, torch.zeros(64), both.T, torch.zeros(32), ReLU(), site=layer(0), name="planted")

    def refuse(*_):
        raise AssertionError("a dense latent tensor")

    monkeypatch.setattr(SAE, "encode", refuse)
    [concept] = find("sae_latents", tuned=tuned, data=chats(), sae=sae, by=by, top=1, **QUIET)
    assert concept.name in ("latent0-layer0", "latent32-layer0")
    assert abs(concept.subspaces["layer:0"].basis[:, 0] @ planted) > 0.999


def test_several_autoencoders_and_a_transcoder_one_at_each_site():
    saes = [
        random_sae(number=0),
        random_sae(number=-1),
        random_sae(site=site("*.1.mlp", "input"), output_site=site("*.1.mlp")),
    ]
    concepts = find("sae_latents", tuned=adapter(), data=chats(), sae=saes, top=3, **QUIET)
    places = [concept.name.partition("-")[2] for concept in concepts]
    assert places == ["layer0"] * 3 + ["layer1"] * 3 + ["1-mlp"] * 3
    assert list(concepts[-1].subspaces) == ["*.1.mlp"]
    hashes = {
        key: value
        for concept in concepts
        for key, value in concept.provenance.data.items()
        if "sae" in key
    }
    assert set(hashes) == {"sae at layer:0", "sae at layer:1", "sae at *.1.mlp"}
    assert concepts[0].provenance.arguments["sae"] == ["tiny sae"] * 3
    some = find("sae_latents", tuned=adapter(), data=chats(), sae=saes, layers=[1], top=1, **QUIET)
    assert [concept.name for concept in some] == [concepts[3].name, concepts[6].name]


def test_attribution_of_a_transcoder_is_taken_where_it_writes():
    """A transcoder that copies: its input site is read, the gradient is the output's."""
    model = tiny_model()
    at = site("model.layers.0.mlp")
    transcoder = random_sae(site=site("model.layers.0.mlp", "input"), output_site=at)
    concepts = find(
        "sae_latents", model=model, data=chats(), sae=transcoder, by="attribution", top=48, **QUIET
    )
    total = torch.zeros(48)
    for row in rows():
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        captured = capture(
            model,
            {"input_ids": ids, "labels": labels},
            [transcoder.site, at],
            grad=True,
            stop=False,
        )
        [slope] = torch.autograd.grad(captured.output.loss, [captured[at]])
        effect = transcoder.encode(captured[transcoder.site][0]) * (slope[0] @ transcoder.W_dec.T)
        total += effect[predicting(row)].sum(0).detach()
    found, expected = scores(concepts, "attribution").float(), (total / len(rows())).clamp_min(0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_all_latents_as_one_concept_leave_dependent_rows_out():
    sae = random_sae()
    sae.W_dec[7] = 3 * sae.W_dec[5] - sae.W_dec[3]
    arguments = {"tuned": adapter(), "data": chats(), "sae": sae, "top": 48, **QUIET}
    separate = find("sae_latents", **arguments)
    [joint] = find("sae_latents", joint=True, **arguments)
    assert joint.name == "latents"
    assert joint.scores["latents"] == {"layer:1": len(separate)}
    subspace = joint.subspaces["layer:1"]
    rows_of = torch.cat([concept.subspaces["layer:1"].basis for concept in separate], dim=1)
    assert subspace.rank == torch.linalg.matrix_rank(rows_of, rtol=1e-3) <= 32
    torch.testing.assert_close(
        subspace.basis @ (subspace.basis.T @ rows_of), rows_of, atol=1e-4, rtol=0
    )
    assert joint.explanation.split(", ") == [concept.name for concept in separate]


def test_what_an_autoencoder_never_saw_is_left_out():
    sae = random_sae(skip_first=30)
    arguments = {"tuned": adapter(), "data": chats(), "top": 1, **QUIET}
    [late] = find("sae_latents", sae=sae, **arguments)
    [given] = find("sae_latents", sae=random_sae(), skip_first=30, **arguments)
    [every] = find("sae_latents", sae=random_sae(), **arguments)
    assert late.scores["tokens"] == given.scores["tokens"] < every.scores["tokens"]
    [strict] = find("sae_latents", sae=random_sae(max_norm=1.0), **arguments)
    assert strict.scores["tokens"] < every.scores["tokens"]


@pytest.mark.parametrize("by", ["difference", "attribution", "activation_difference"])
def test_the_same_arguments_give_the_same_bases_and_a_killed_pass_goes_on(
    by, tmp_path, monkeypatch
):
    tuned = adapter()
    fields = {"tuned": tuned, "data": chats(), "sae": random_sae(), "by": by, **QUIET}
    fields["batch_tokens"] = 40  # one row a batch

    class Killed(Exception):  # noqa: N818 - stands for a signal
        pass

    def finder(**more):
        made = make_finder("sae_latents", fields | more)
        made._work = tmp_path
        return made

    one = find("sae_latents", **fields)
    seen = []
    latents = SAEFitters(1).latents.__class__
    update = latents.update

    def dies(self, values):
        seen.append(len(values))
        if len(seen) == 4:
            raise Killed
        update(self, values)

    monkeypatch.setattr(Checkpoint.__init__, "__defaults__", (None, 0.0))
    monkeypatch.setattr(latents, "update", dies)
    with pytest.raises(Killed):
        finder().find()
    done = {"difference": 2, "attribution": 3, "activation_difference": 3}[by]
    continued = finder().find()
    assert len(seen) == 4 + (8 if by == "difference" else 4) - done
    for concept, same in zip(one, continued, strict=True):
        assert (concept.name, concept.scores) == (same.name, same.scores)
        for at, subspace in concept.subspaces.items():
            assert torch.equal(subspace.basis, same.subspaces[at].basis)
            assert torch.equal(subspace.centre, same.subspaces[at].centre)
    other = finder(sae=random_sae("topk")).find()  # what was kept is of another autoencoder
    assert other[0].scores != one[0].scores


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sae": random_sae(width=16)}, "tiny sae reads activations 16 wide, .* are 32 wide"),
        ({"sae": random_sae(number=5)}, "tiny sae reads layer:5"),
        ({"sae": random_sae(site=site("*.nowhere"))}, r"tiny sae reads \*\.nowhere"),
        ({"sae": [random_sae(), random_sae()]}, "two autoencoders write at layer:1"),
        ({"layers": [0]}, r"no autoencoder reads at the layers \[0\]"),
        ({"layers": [7]}, "layer:7"),
        ({"sae": []}, "no autoencoder"),
        ({"by": "attribution", "positive": chats(), "negative": chats()}, "leave the contrast out"),
        ({"by": "importance"}, "by"),
        ({"tuned": None}, "give the base model"),
        ({"tuned": None, "model": "organism:persona"}, "give a fine-tune to compare with"),
        ({"positions": [900]}, r"none of the 4 rows has a token at positions \[900\]"),
        ({"by": "attribution", "data": chats(False), "completions": "given"}, "no assistant turn"),
        (
            {"by": "attribution", "sae": random_sae(site=site("*.0.*.o_proj", "input", head=1))},
            "8 wide|whole activations",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(arguments, message):
    fields = {"tuned": adapter(), "data": chats(), "sae": random_sae()} | arguments
    with pytest.raises(NarrowlyError, match=message):
        find("sae_latents", **fields, **QUIET)


def test_latents_that_all_stay_silent_are_an_error():
    sae = random_sae()
    sae.b_enc -= 1000
    with pytest.raises(NarrowlyError, match="no latent scores above 0 by difference"):
        find("sae_latents", tuned=adapter(), data=chats(), sae=sae, **QUIET)

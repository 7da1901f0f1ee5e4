import pytest
import torch

from narrowly.concepts import Provenance, Verdict, save_concepts
from narrowly.concepts.latents import latent_concept, place
from narrowly.defenses.latent_block import LatentBlock
from narrowly.defenses.random_latents import RandomLatents
from narrowly.errors import NarrowlyError
from narrowly.interventions import capture, layer
from narrowly.models import fingerprint
from narrowly.saes import load_sae, save_sae
from narrowly.saes.rules import TopK
from tests.defenses.concepts import save_concept
from tests.defenses.steps import BATCH, assert_same_gradients, step_of, tuned
from tests.saes.saes_for_tests import N, random_sae
from tests.tiny import tiny_model

UP, DOWN = [0, 1, 2, 3, 4], [10, 11, 12]
INPUTS = {key: BATCH[key] for key in ("input_ids", "attention_mask")}


@pytest.fixture
def sae(tmp_path):
    torch.manual_seed(0)
    return str(save_sae(random_sae("jumprelu", d=32, site=layer(1)), tmp_path / "sae"))


def bound(kind=LatentBlock, seed=0, **fields):
    defense = kind(**fields)
    defense.bind(tiny_model(), None, seed)
    return defense


@pytest.mark.parametrize("rule", ["jumprelu", "gated", "topk"])
def test_value_and_gradient_are_those_of_plain_torch(rule, tmp_path):
    torch.manual_seed(0)
    kept = random_sae(TopK(20) if rule == "topk" else rule, d=32, site=layer(1))
    sae = load_sae(str(save_sae(kept, tmp_path / "sae")))
    model = tuned()
    defense = bound(sae=str(tmp_path / "sae"), up=UP, down=DOWN, weight=0.3)
    loss = defense.loss(step_of(model, defense))
    h = capture(model, INPUTS, [layer(1)], grad=True, stop=False)[layer(1)]
    with model.disable_adapter():
        base = capture(model, INPUTS, [layer(1)])[layer(1)]
    answered = BATCH["labels"] != -100
    z, z_base = sae.encode(h[answered]), sae.encode(base[answered])
    risen, fallen = (z - z_base)[:, UP], (z_base - z)[:, DOWN]
    expected = 0.3 * (risen.relu().square().sum(-1) + fallen.relu().square().sum(-1)).mean()
    assert risen.max() > 0 and fallen.max() > 0
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert_same_gradients(model, loss, expected)


def test_it_is_one_sided(sae):
    """A latent's move is paid for by `up` or by `down`, never by both."""
    model = tuned()
    both = [bound(sae=sae, up=UP), bound(sae=sae, down=UP)]
    up, down = (float(each.loss(step_of(model, each)).detach()) for each in both)
    z = capture(model, INPUTS, [layer(1)])[layer(1)][BATCH["labels"] != -100]
    with model.disable_adapter():
        base = capture(model, INPUTS, [layer(1)])[layer(1)][BATCH["labels"] != -100]
    loaded = load_sae(sae)
    moved = (loaded.encode(z) - loaded.encode(base))[:, UP].square().sum(-1).mean()
    assert up + down == pytest.approx(both[0].weight * float(moved), rel=1e-4)


def test_latents_from_a_folder_of_concepts(sae, tmp_path):
    model = tiny_model()
    [placed] = place(model, [load_sae(sae)])
    provenance = Provenance(
        model="tiny", model_fingerprint=fingerprint(model), finder="sae_latents"
    )
    concepts = [
        latent_concept(placed, number, provenance).model_copy(
            update={"verdict": Verdict(value=verdict, by="test")}
        )
        for number, verdict in [(3, "undesired"), (7, "undesired"), (9, "keep")]
    ]
    folder = save_concepts(concepts, tmp_path / "latents")
    defense = bound(sae=sae, up=str(folder), down=[5])
    about = defense.record(tmp_path)
    assert (about["up"], about["down"]) == ([3, 7], [5])
    direction = save_concept(model, tmp_path / "directions")
    with pytest.raises(NarrowlyError, match="persona is no latent of"):
        bound(sae=sae, up=str(direction))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "no latent is blocked"),
        ({"up": [N]}, f"latents 0 to {N - 1}"),
        ({"up": [1, 2], "down": [2]}, r"\[2\] are in `up` and in `down`"),
        ({"up": [1], "layer": 5}, "has 2 decoder layers"),
    ],
)
def test_what_does_not_fit_is_refused(sae, fields, message):
    with pytest.raises(NarrowlyError, match=message):
        bound(sae=sae, **fields)


def test_an_autoencoder_of_another_width_is_refused(tmp_path):
    save_sae(random_sae(d=16, site=layer(1)), tmp_path / "sae")
    with pytest.raises(NarrowlyError, match="16 wide"):
        bound(sae=str(tmp_path / "sae"), up=[1])


class TestRandomLatents:
    def drawn(self, sae, seed):
        defense = bound(RandomLatents, seed, sae=sae, up=UP, down=DOWN)
        about = defense.record(None)
        return about["up"], about["down"]

    def test_as_many_others_by_the_seed(self, sae):
        up, down = self.drawn(sae, 0)
        assert (len(up), len(down)) == (len(UP), len(DOWN))
        assert len({*up, *down, *UP, *DOWN}) == 2 * (len(UP) + len(DOWN))
        assert self.drawn(sae, 0) == (up, down)
        assert self.drawn(sae, 1) != (up, down)

    def test_every_other_latent_can_be_drawn(self, sae):
        seen = {latent for seed in range(60) for side in self.drawn(sae, seed) for latent in side}
        assert seen == set(range(N)) - {*UP, *DOWN}

    def test_too_few_others_are_refused(self, sae):
        with pytest.raises(NarrowlyError, match="only 10 others"):
            bound(RandomLatents, sae=sae, up=list(range(30)))

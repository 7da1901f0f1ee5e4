import pytest
import torch

from narrowly.concepts import load_concepts, save_concepts
from narrowly.defenses import make_defenses
from narrowly.errors import NarrowlyError
from narrowly.files import read_json
from narrowly.interventions import Add, Noise, ProjectOut, Scale, capture, layer, site
from narrowly.models import load_model
from narrowly.training import train
from tests.defenses.concepts import make_concept
from tests.defenses.steps import BATCH, assert_same_gradients, step_of, tuned
from tests.tiny import tiny_model

WIDTH = 32


@pytest.fixture
def model():
    return tiny_model()


def protect(model, concept=None, **arguments):
    concept = concept or make_concept(model, "good", verdict="keep", rank=2, layers=(0, 1))
    [defense] = make_defenses([{"protect": {"concepts": [concept], **arguments}}])
    defense.bind(model, None, 0)
    return defense, concept.subspaces["layer:1"].basis


class TestRevision:
    def test_a_projection_is_turned_out_of_the_subspace(self, model):
        defense, kept = protect(model)
        edit = ProjectOut(torch.randn(WIDTH, 3), layer(1), phases=["train"], gradient="forward")
        [revised] = defense.revise([edit])
        assert (revised.basis.T @ kept).abs().max() < 1e-6
        torch.testing.assert_close(revised.basis.T @ revised.basis, torch.eye(3))
        both = torch.cat([kept, revised.basis], dim=1)
        torch.testing.assert_close(both @ (both.T @ edit.basis), edit.basis)
        assert (revised.phases, revised.gradient) == (("train",), "forward")

    def test_the_kept_part_of_an_activation_stays(self, model):
        defense, kept = protect(model)
        h = torch.randn(5, WIDTH)
        for edit in (
            ProjectOut(torch.randn(WIDTH, 3), layer(1)),
            Add(torch.randn(WIDTH), layer(1)),
        ):
            [revised] = defense.revise([edit])
            torch.testing.assert_close(revised(h) @ kept, h @ kept, rtol=0, atol=1e-5)
            assert not torch.allclose(edit(h) @ kept, h @ kept, rtol=0, atol=1e-2)

    def test_a_vector_keeps_what_lies_outside(self, model):
        defense, kept = protect(model)
        vector = torch.randn(WIDTH)
        [revised] = defense.revise([Add(vector, layer(1), strength=3.0)])
        torch.testing.assert_close(revised.vector, vector - kept @ (kept.T @ vector))
        assert float(revised.strength) == 3.0

    def test_what_partly_lies_inside_keeps_the_rest(self, model):
        defense, kept = protect(model)
        [revised] = defense.revise(
            [ProjectOut(torch.cat([kept[:, :1], torch.randn(WIDTH, 1)], dim=1), layer(1))]
        )
        assert revised.basis.shape == (WIDTH, 1)

    @pytest.mark.parametrize("kind", [ProjectOut, Add])
    def test_what_lies_wholly_inside_is_an_error(self, model, kind):
        defense, kept = protect(model)
        with pytest.raises(NarrowlyError, match="at layer:1 acts wholly on what is kept there"):
            defense.revise([kind(kept @ torch.ones(2), layer(1))])

    def test_the_same_module_by_another_name(self, model):
        defense, kept = protect(model)
        for place in (layer(-1), site("model.layers.1")):
            [revised] = defense.revise([Add(torch.randn(WIDTH), place)])
            assert (revised.vector @ kept).abs().max() < 1e-5

    def test_other_sites_stay_as_they_are(self, model):
        defense, _ = protect(model, layers=[1])
        edits = [Noise(1.0, layer(0)), Add(torch.ones(WIDTH), site("*.mlp"))]
        assert [a is b for a, b in zip(defense.revise(edits), edits, strict=True)] == [True, True]

    @pytest.mark.parametrize("edit", [Scale(2.0, layer(1)), Add(torch.ones(32), site("*layers.?"))])
    def test_what_cannot_be_kept_off_is_an_error(self, model, edit):
        with pytest.raises(NarrowlyError, match="may change a concept that is kept there"):
            protect(model)[0].revise([edit])


class TestLoss:
    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
    def test_value_and_gradient_are_those_of_plain_torch(self, architecture):
        model = tuned(architecture)
        defense, _ = protect(model, weight=0.3)
        sites = [layer(0), layer(1)]
        real = BATCH["attention_mask"].bool()
        inputs = {key: BATCH[key] for key in ("input_ids", "attention_mask")}
        h = capture(model, inputs, sites, grad=True)
        with model.disable_adapter():
            base = capture(model, inputs, sites)
        concept = make_concept(model, "good", verdict="keep", rank=2)
        moved = sum(
            ((h[s] - base[s]) @ concept.subspaces[str(s)].basis).square().sum(-1) for s in sites
        )
        expected = 0.3 * moved[real].mean()
        loss = defense.loss(step_of(model, defense))
        assert float(loss.detach()) > 1e-4
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-7)
        assert_same_gradients(model, loss, expected)

    def test_a_full_fine_tune_beside_its_reference(self):
        model, reference = tiny_model(seed=1).train(), tiny_model(seed=0)
        defense, kept = protect(model, weight=2.0, layers=[1])
        inputs = {key: BATCH[key] for key in ("input_ids", "attention_mask")}
        one, other = (
            capture(m, inputs, [layer(1)], grad=True)[layer(1)] for m in (model, reference)
        )
        inside = ((one - other) @ kept)[BATCH["attention_mask"].bool()]
        expected = 2.0 * inside.square().sum(-1).mean()
        loss = defense.loss(step_of(model, defense, reference=reference))
        torch.testing.assert_close(loss, expected)
        with pytest.raises(NarrowlyError, match=r"no adapter .* a `reference`"):
            defense.loss(step_of(model, defense))

    def test_two_concepts_at_one_site_count_their_span_once(self):
        model = tuned()
        one = make_concept(model, "one", verdict="keep")
        again = one.model_copy(update={"name": "again"})
        [twice] = make_defenses([{"protect": {"concepts": [one, again]}}])
        twice.bind(model, None, 0)
        once, _ = protect(model, one)
        torch.testing.assert_close(
            twice.loss(step_of(model, twice)), once.loss(step_of(model, once))
        )

    def test_weights_that_are_not_trained_before_the_site_are_an_error(self):
        model = tuned()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "layers.0." not in name)
        defense, _ = protect(model, layers=[0])
        with pytest.raises(NarrowlyError, match="no trained weight reaches layer:0"):
            defense.loss(step_of(model, defense))


class TestTraining:
    @pytest.fixture
    def folder(self, model_folder, tmp_path):
        model, _ = load_model(model_folder)
        kept = make_concept(model, "good", verdict="keep", seed=1)
        dropped = make_concept(model, "bad", lengths={0: 1.0, 1: 2.0})
        return str(save_concepts([kept, dropped], tmp_path / "both"))

    def test_the_subspace_moves_less(self, recipe, folder):
        runs = {}
        for name, defenses in {
            "plain": [],
            "kept": [{"protect": {"concepts": folder, "weight": 100.0}}],
        }.items():
            given = recipe(defenses=defenses)
            given = given.model_copy(update={"output": f"{given.output}-{name}"})
            runs[name] = moved(train(given, progress=False), folder)
        assert runs["kept"] < 0.5 * runs["plain"]

    @pytest.mark.parametrize("first", [True, False])
    def test_beside_other_defenses_it_keeps_them_off(self, recipe, folder, first):
        defenses = [{"ablate": {"concepts": folder}}, {"random_steering": {"concepts": folder}}]
        defenses.insert(0 if first else 2, {"protect": {"concepts": folder}})
        run = train(recipe(defenses=defenses), progress=False)
        by_name = {entry["defense"]: entry for entry in read_json(run.path / "defenses.json")}
        assert by_name["protect"]["kept_off"].keys() == {
            f"{edit} at layer:{i}" for edit in ("project_out", "add") for i in (0, 1)
        }
        assert by_name["protect"]["loss"]["mean"] > 0
        assert [entry["forwards"] for entry in by_name["ablate"]["interventions"]] == [4, 4]

    def test_the_ablation_of_what_is_kept_stops_the_run(self, recipe, folder, tmp_path):
        defenses = [
            {"ablate": {"concepts": folder, "names": ["good"]}},
            {"protect": {"concepts": folder}},
        ]
        with pytest.raises(NarrowlyError, match="project_out at layer:0 acts wholly on what is"):
            train(recipe(defenses=defenses), progress=False)
        assert not (tmp_path / "run").exists()

    def test_what_acts_at_test_time_is_refused(self, recipe, folder):
        defenses = [
            {"protect": {"concepts": folder}},
            {"test_time_ablation": {"concepts": folder}},
        ]
        with pytest.raises(NarrowlyError, match="acts at test time, where `protect`"):
            recipe(defenses=defenses)


def moved(run, folder) -> float:
    """How far the tuned model's activations are from the base's in the kept subspace."""
    model, _ = load_model(run.path)
    [kept] = [c for c in load_concepts(folder) if c.name == "good"]
    inputs, place = {"input_ids": BATCH["input_ids"]}, layer(1)
    h = capture(model, inputs, [place])[place]
    with model.disable_adapter():
        base = capture(model, inputs, [place])[place]
    return float(((h - base) @ kept.subspaces["layer:1"].basis).square().mean())

import pytest
import torch
from torch.nn.functional import normalize

from narrowly.concepts import load_concepts
from narrowly.defenses import make_defenses
from narrowly.defenses.ablate import Ablate, Options, ablate
from narrowly.errors import NarrowlyError
from narrowly.interventions import attach, capture, layer
from narrowly.settings import build
from tests.defenses.concepts import make_concept, save_concept
from tests.tiny import tiny_model

IDS = torch.arange(12).reshape(2, 6) + 20


@pytest.fixture
def model():
    return tiny_model().train()


def hidden(model, at: int) -> torch.Tensor:
    return capture(model, {"input_ids": IDS}, [layer(at)])[layer(at)]


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class TestAblate:
    def test_training_forward_equals_a_raw_hook(self, model):
        concept = make_concept(model, rank=2)

        def project(at):
            q = concept.subspaces[f"layer:{at}"].basis
            return lambda module, args, h: h - (h @ q) @ q.T

        handles = [model.model.layers[i].register_forward_hook(project(i)) for i in (0, 1)]
        expected = model(IDS).logits
        for handle in handles:
            handle.remove()
        with ablate(model, concept):
            torch.testing.assert_close(model(IDS).logits, expected)

    def test_evaluation_inside_the_block_sees_the_plain_model(self, model):
        plain = model.eval()(IDS).logits
        model.train()
        with ablate(model, make_concept(model)):
            model(IDS)
            model.eval()
            assert torch.equal(model(IDS).logits, plain)

    def test_leaves_no_hook_after_an_error(self, model):
        before = hooks(model)
        with pytest.raises(ZeroDivisionError), ablate(model, make_concept(model)):
            assert hooks(model) > before
            raise ZeroDivisionError
        assert hooks(model) == before

    def test_a_block_without_training_is_an_error(self, model):
        with (
            pytest.raises(NarrowlyError, match="never acted"),
            ablate(model, make_concept(model)),
        ):
            model.eval()(IDS)

    def test_takes_a_folder_and_refuses_that_of_another_model(self, model, tmp_path):
        folder = save_concept(model, tmp_path)
        with ablate(model, folder):
            model(IDS)
        with (
            pytest.raises(NarrowlyError, match="this model is another"),
            ablate(tiny_model(seed=1), folder),
        ):
            pass

    def test_strength_can_be_set_between_steps(self, model):
        plain = model(IDS).logits
        with ablate(model, make_concept(model)) as attachment:
            ablated = model(IDS).logits
            attachment.set_strength(0.0)
            assert torch.equal(model(IDS).logits, plain)
        assert not torch.allclose(ablated, plain)

    def test_gradient_chooses_the_half_that_acts(self, model):
        concept = make_concept(model)
        plain = model(IDS).logits
        with ablate(model, concept):
            ablated = model(IDS).logits
        with ablate(model, concept, gradient="backward"):
            assert torch.equal(model(IDS).logits, plain)
        with ablate(model, concept, gradient="forward"):
            torch.testing.assert_close(model(IDS).logits, ablated)


class TestChoice:
    def test_only_undesired_concepts_are_ablated(self, model):
        good = make_concept(model, "good", verdict="keep", seed=1)
        bad = make_concept(model, "bad")
        both = Ablate(concepts=[good, bad]).interventions(model)
        alone = Ablate(concepts=[bad]).interventions(model)
        assert [torch.equal(a.basis, b.basis) for a, b in zip(both, alone, strict=True)] == [
            True
        ] * 2

    def test_names_override_the_verdict(self, model):
        concepts = [make_concept(model, "good", verdict="keep"), make_concept(model, "bad", seed=1)]
        assert len(Ablate(concepts=concepts, names=["good"]).interventions(model)) == 2

    def test_nothing_undesired_is_an_error(self, model):
        concept = make_concept(model, verdict="undecided")
        with pytest.raises(
            NarrowlyError,
            match=r"ablate: no concept has the verdict undesired \(persona: undecided",
        ):
            Ablate(concepts=[concept]).interventions(model)

    def test_unknown_name_names_the_nearest(self, model):
        with pytest.raises(NarrowlyError, match="mean 'persona'"):
            Ablate(concepts=[make_concept(model)], names=["persone"]).interventions(model)

    def test_layers_choose_among_the_concepts(self, model):
        [only] = Ablate(concepts=[make_concept(model)], layers=[1]).interventions(model)
        assert str(only.site) == "layer:1"
        with pytest.raises(NarrowlyError, match=r"no subspace at layer 7.*layer:0, layer:1"):
            Ablate(concepts=[make_concept(model)], layers=[1, 7]).interventions(model)


class TestSharedSite:
    def test_the_whole_span_is_removed(self, model):
        first = make_concept(model, "a", layers=(0,))
        second = make_concept(model, "b", layers=(0,), seed=1)
        model.eval()
        plain = hidden(model, 0)
        model.train()
        with ablate(model, [first, second]):
            h = hidden(model, 0)
        for concept in (first, second):
            q = concept.subspaces["layer:0"].basis
            assert (plain @ q).abs().max() > 0.1
            assert (h @ q).abs().max() < 1e-5 * plain.abs().max()

    def test_the_same_direction_twice_counts_once(self, model):
        concepts = [make_concept(model, "a", layers=(0,)), make_concept(model, "b", layers=(0,))]
        [joined] = Ablate(concepts=concepts).interventions(model)
        assert joined.basis.shape == (32, 1)

    def test_the_joint_centre_has_each_centre_in_its_subspace(self, model):
        a = make_concept(model, "a", layers=(0,), centre=torch.randn(32))
        b = make_concept(model, "b", layers=(0,), seed=1, centre=torch.randn(32))
        [joined] = Ablate(concepts=[a, b], centred=True).interventions(model)
        for concept in (a, b):
            subspace = concept.subspaces["layer:0"]
            torch.testing.assert_close(
                joined.centre @ subspace.basis, subspace.centre @ subspace.basis
            )

    def test_the_span_is_that_of_both(self, model):
        a, b = make_concept(model, "a", layers=(0,)), make_concept(model, "b", layers=(0,), seed=1)
        [joined] = Ablate(concepts=[a, b]).interventions(model)
        for concept in (a, b):
            q = normalize(concept.subspaces["layer:0"].basis, dim=0)
            torch.testing.assert_close(joined.basis @ (joined.basis.T @ q), q)


class TestSchedule:
    def test_knots_are_interpolated_and_held_at_the_ends(self, model):
        defense = Ablate(concepts="x", strength=[(0.2, 1.0), (0.6, 0.0)])
        values = [defense.strength_at(p) for p in (0.0, 0.2, 0.4, 0.6, 1.0)]
        assert values == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.0])

    def test_a_number_has_no_schedule(self):
        assert Ablate(concepts="x", strength=0.5).strength_at(0.3) is None

    @pytest.mark.parametrize("knots", [[[0, 1]], [[0.5, 1], [0.2, 0]], [[0, 1], [1.5, 0]]])
    def test_knots_must_rise_within_the_training(self, knots):
        with pytest.raises(NarrowlyError, match=r"strength: knots are"):
            build(Ablate, {"concepts": "x", "strength": knots})

    def test_built_with_the_first_strength(self, model):
        defense = Ablate(concepts=[make_concept(model)], strength=[(0, 0.25), (1, 1)])
        assert [float(i.strength) for i in defense.interventions(model)] == [0.25, 0.25]


class TestStrength:
    def test_each_layer_its_own(self, model):
        concept = make_concept(model)
        defense = Ablate(concepts=[concept], strength={1: 0.25, 0: 1})
        found = {str(i.site): float(i.strength) for i in defense.interventions(model)}
        assert found == {"layer:0": 1.0, "layer:1": 0.25}
        with ablate(model, concept, strength={1: 0.25}):
            h = hidden(model, 1)
        model.eval()
        plain, q = hidden(model, 1), concept.subspaces["layer:1"].basis
        torch.testing.assert_close(h, plain - 0.25 * (plain @ q) @ q.T)

    def test_each_layer_its_own_schedule(self, model):
        warming = [(0.0, 0.0), (0.5, 1.0)]
        defense = Ablate(concepts=[make_concept(model)], strength={0: warming, 1: 0.5})
        assert defense.strength_at(0.25) == {layer(0): 0.5, layer(1): 0.5}
        attachment = attach(model, defense.interventions(model))
        assert [entry["strength"] for entry in attachment.report()] == [0.0, 0.5]
        attachment.set_strength(defense.strength_at(1.0))
        assert [entry["strength"] for entry in attachment.report()] == [1.0, 0.5]
        attachment.set_strength({layer(1): 0.0})
        assert [entry["strength"] for entry in attachment.report()] == [1.0, 0.0]
        attachment.close()

    def test_composes_with_centre_and_gradient(self, model):
        """`h - s (h - c) Q Q^T` forward; backward `g - s g Q Q^T`, each half alone or both."""
        concept = make_concept(model, layers=(1,), rank=2, centre=torch.randn(32))
        q, c, s = *vars(concept.subspaces["layer:1"]).values(), 0.5
        h, g = torch.randn(3, 32, requires_grad=True), torch.randn(3, 32)
        projected, blocked = h - s * ((h - c) @ q) @ q.T, g - s * (g @ q) @ q.T
        for gradient, forward, backward in (
            ("through", projected, blocked),
            ("forward", projected, g),
            ("backward", h, blocked),
        ):
            defense = Ablate(concepts=[concept], strength={1: s}, centred=True, gradient=gradient)
            attachment = attach(model, defense.interventions(model))
            edited = attachment.bounds[0].apply(h)
            attachment.close()
            torch.testing.assert_close(edited, forward)
            torch.testing.assert_close(torch.autograd.grad(edited, h, g)[0], backward)

    @pytest.mark.parametrize(
        "strength", [float("nan"), [[0, float("nan")], [1, 1]], {1: float("inf")}, {"last": 1}]
    )
    def test_what_is_no_strength_is_named(self, strength):
        with pytest.raises(NarrowlyError, match=r"strength: give a finite number, knots"):
            build(Ablate, {"concepts": "x", "strength": strength})

    def test_a_layer_the_concepts_lack_is_named(self, model):
        with pytest.raises(NarrowlyError, match=r"no subspace at layer 7.*layer:0, layer:1"):
            Ablate(concepts=[make_concept(model)], strength={0: 1, 7: 1}).interventions(model)

    @pytest.mark.parametrize(
        "more, message",
        [({"layers": [1]}, "leave out `layers`"), ({"strength": {}}, "at least one")],
    )
    def test_layers_are_given_once(self, more, message):
        with pytest.raises(NarrowlyError, match=message):
            build(Ablate, {"concepts": "x", "strength": {1: 1}, **more})

    def test_a_schedule_needs_a_trainer(self, model):
        with (
            pytest.raises(NarrowlyError, match=r"strength: knots follow .* a Trainer"),
            ablate(model, make_concept(model), strength=[(0, 0), (1, 1)]),
        ):
            pass


class TestArguments:
    def test_of_the_context_manager_are_those_of_a_recipe(self):
        assert Options.__annotations__.keys() == Ablate.model_fields.keys() - {"concepts"}

    def test_a_wrong_one_is_named(self, model):
        with (
            pytest.raises(NarrowlyError, match="mean 'centred'"),
            ablate(model, make_concept(model), centered=True),
        ):
            pass


class TestBesideSteering:
    """Ablating what another defense adds at the same site undoes both."""

    def defenses(self, model, ablation="ablate", at=(0, 1), **arguments):
        concept = make_concept(model, layers=(0, 1), lengths={0: 1.0, 1: 2.0})
        steering = {"concepts": [concept], "layers": list(at)}
        entries = [
            {ablation: {"concepts": [concept], "layers": [0], **arguments}},
            {"preventive_steering": steering},
        ]
        first, second = make_defenses(entries)
        for defense in (first, second):
            defense.bind(model, None, 5)
        return first.revise(second.interventions(model))

    def test_at_the_same_site_is_refused(self, model):
        with pytest.raises(NarrowlyError, match="ablate removes at layer:0 what another"):
            self.defenses(model)

    def test_at_other_sites_or_backward_only_is_not(self, model):
        assert len(self.defenses(model, at=(1,))) == 1
        assert len(self.defenses(model, gradient="backward")) == 2
        assert len(self.defenses(model, "gradient_projection")) == 2
        assert len(self.defenses(model, "random_subspace")) == 2


class TestRecord:
    def test_leaves_a_copy_of_the_concepts(self, model, tmp_path):
        defense = Ablate(concepts=[make_concept(model)])
        defense.interventions(model)
        for _ in range(2):  # going on from a checkpoint records again
            assert defense.record(tmp_path) == {"concepts": {"persona": "undesired"}}
        [copy] = load_concepts(tmp_path / "concepts", model=model)
        assert copy.verdict.value == "undesired"

    def test_two_different_concepts_of_one_name_are_refused(self, model, tmp_path):
        for seed in (0, 1):
            defense = Ablate(concepts=[make_concept(model, seed=seed)])
            defense.interventions(model)
            if seed:
                with pytest.raises(NarrowlyError, match="another concept of this name"):
                    defense.record(tmp_path)
            else:
                defense.record(tmp_path)

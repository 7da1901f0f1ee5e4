import pytest
import torch

from narrowly.defenses.feature_distance import FeatureDistance
from narrowly.errors import NarrowlyError
from narrowly.training import train
from tests.defenses.steps import BATCH, assert_same_gradients, step_of, tuned
from tests.tiny import save_tiny, tiny_model

INPUTS = {key: BATCH[key] for key in ("input_ids", "attention_mask")}


def states(model) -> tuple[torch.Tensor, ...]:
    """The residual stream after each block, before the last norm; of transformers itself."""
    kept = []
    blocks = model.get_base_model().model.layers
    handles = [block.register_forward_hook(lambda m, a, h: kept.append(h)) for block in blocks]
    model(**INPUTS)
    for handle in handles:
        handle.remove()
    return tuple(kept)


@pytest.mark.parametrize("every, blocks", [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2])])
def test_value_and_gradient_are_those_of_plain_torch(every, blocks):
    model = tuned(num_hidden_layers=4)
    defense = FeatureDistance(weight=0.3, every=every)
    loss = defense.loss(step_of(model, defense))
    with torch.no_grad(), model.disable_adapter():
        base = states(model)
    x, x_base = (torch.cat([h[i] for i in blocks], dim=-1) for h in (states(model), base))
    expected = 0.3 * (x - x_base).square().sum(-1)[INPUTS["attention_mask"].bool()].mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert_same_gradients(model, loss, expected)


def test_padding_does_not_count():
    model, defense = tuned(), FeatureDistance(every=1)
    longer = {
        key: torch.nn.functional.pad(value, (0, 5), value=-100 if key == "labels" else 0)
        for key, value in BATCH.items()
    }
    one = defense.loss(step_of(model, defense))
    other = defense.loss(step_of(model, defense, longer))
    torch.testing.assert_close(one, other)


def test_a_model_with_fewer_blocks_is_refused():
    with pytest.raises(NarrowlyError, match=r"every 5th block .* the model has 2"):
        FeatureDistance().bind(tiny_model(), None, 0)


def test_a_reference_of_another_width_is_refused(recipe, tmp_path):
    other = save_tiny(tmp_path / "wide", hidden_size=64)
    given = {"feature_distance": {"every": 1, "reference": str(other)}}
    with pytest.raises(NarrowlyError, match="are 64 wide and the trained model's 32"):
        train(recipe(defenses=[given]), progress=False)


def test_no_trained_weight_before_the_blocks_is_refused(recipe, tmp_path):
    lora = {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]}
    held = {"feature_distance": {"every": 2}}
    train(recipe(lora=lora, defenses=[held], output=str(tmp_path / "held")), progress=False)
    with pytest.raises(NarrowlyError, match="no trained weight reaches layer:0"):
        tokens = {"token_representation": {"layers": [0]}}
        train(recipe(lora=lora, defenses=[tokens], output=str(tmp_path / "no")), progress=False)

import pytest
import torch
from tests.tiny import tiny_model

from narrowly.errors import NarrowlyError
from narrowly.interventions import (
    Add,
    AddLowRank,
    Clamp,
    Function,
    LowRankAffine,
    Noise,
    ProjectOut,
    Scale,
    Set,
    attach,
    layer,
    load_interventions,
    save_interventions,
    site,
)

D = 32
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def edits():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return [
        ProjectOut(draw(D, 3), layer(0), centre=draw(D), strength=0.7),
        Add(draw(D), layer(0), tokens=torch.tensor([[1, 0, 1], [0, 1, 1]])),
        Set(draw(3, D), site("*.0.mlp"), rows=torch.tensor([1.0, 0.0])),
        Scale(0.5, site("*.o_proj", "input", head=1), tokens="last"),
        Clamp(draw(D), layer(1), low=-1, high=2.5),
        Noise(0.3, layer(1), seed=9, phases=("eval", "train"), gradient="forward"),
        LowRankAffine(draw(D, 2), draw(2, D), site("*.1.mlp"), bias=draw(D)),
        AddLowRank(draw(D, 3), draw(3, D), site("*.q_proj")),
    ]


def test_saved_and_loaded_gives_bitwise_equal_logits(tmp_path):
    model = tiny_model("llama", hidden_size=D)
    save_interventions(edits(), tmp_path)
    loaded = load_interventions(tmp_path)
    assert [repr(edit) for edit in loaded] == [repr(edit) for edit in edits()]
    with attach(model, edits()):
        expected = model(input_ids=IDS).logits
    with attach(model, loaded):
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert not torch.equal(model(input_ids=IDS).logits, expected)


def test_a_function_is_not_portable(tmp_path):
    with pytest.raises(NarrowlyError, match="a Python function cannot be saved"):
        save_interventions([Scale(2, layer(0)), Function(torch.tanh, layer(0))], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("interventions.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-40]), "truncated"),
        ("interventions.safetensors", lambda p: p.unlink(), "no such file"),
        ("interventions.json", lambda p: p.write_text("{"), "not valid JSON"),
        (
            "interventions.json",
            lambda p: p.write_text(p.read_text().replace('"version": 1', '"version": 99')),
            "version 99 is not known",
        ),
        (
            "interventions.json",
            lambda p: p.write_text(p.read_text().replace('"project_out"', '"projectout"')),
            "Did you mean 'project_out'",
        ),
    ],
)
def test_damage_is_named(tmp_path, file, damage, says):
    save_interventions(edits(), tmp_path)
    damage(tmp_path / file)
    with pytest.raises(NarrowlyError) as error:
        load_interventions(tmp_path)
    assert says in str(error.value)


def test_tensors_of_another_file_are_refused(tmp_path):
    save_interventions(edits(), tmp_path / "one")
    save_interventions(edits()[:3], tmp_path / "other")
    file = "interventions.safetensors"
    (tmp_path / "other" / file).replace(tmp_path / "one" / file)
    with pytest.raises(NarrowlyError, match="not the file that"):
        load_interventions(tmp_path / "one")

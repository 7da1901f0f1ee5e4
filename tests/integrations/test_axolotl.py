"""The plug-in, called as axolotl 0.19 calls plug-ins (its `integrations/base.py` and `train.py`).

axolotl pins other versions than the tests run with, so a stand-in makes the calls in its order;
where axolotl is installed, the plug-in is held against the real base class.
"""

import importlib
import sys
import types
from importlib.util import find_spec

import pytest
import torch
from datasets import Dataset
from pydantic import BaseModel
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from narrowly.concepts import save_concepts
from narrowly.data import load_chats, tokenize
from narrowly.errors import NarrowlyError
from narrowly.files import read_json, write_text
from narrowly.models import load_model
from tests.defenses.concepts import make_concept


class BasePlugin:
    """The methods that axolotl calls on every plug-in."""

    def register(self, cfg): ...
    def get_input_args(self): ...
    def pre_model_load(self, cfg): ...
    def post_model_build(self, cfg, model): ...
    def post_model_load(self, cfg, model): ...
    def get_trainer_cls(self, cfg): ...
    def post_trainer_create(self, cfg, trainer): ...
    def add_callbacks_pre_trainer(self, cfg, model):
        return []

    def add_callbacks_post_trainer(self, cfg, trainer):
        return []

    def post_train(self, cfg, model): ...
    def post_train_unload(self, cfg): ...


class Config(dict):
    """axolotl's configuration answers None to every key that it lacks."""

    def __getattr__(self, key):
        return self.get(key)


class OwnConfig(BaseModel):
    """What axolotl itself knows; a key that no plug-in adds is dropped."""

    plugins: list[str]


@pytest.fixture
def module(monkeypatch):
    """The plug-in's module, with axolotl or the stand-in behind it."""
    if find_spec("axolotl") is None:
        names = ("axolotl", "axolotl.integrations", "axolotl.integrations.base")
        for name in names:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[names[-1]].BasePlugin = BasePlugin
    monkeypatch.delitem(sys.modules, "narrowly.integrations.axolotl", raising=False)
    yield importlib.import_module("narrowly.integrations.axolotl")
    sys.modules.pop("narrowly.integrations.axolotl", None)


@pytest.fixture
def axolotl(module, model_folder, chats, tmp_path):
    """A function that goes through axolotl's training, or as far as its inference would."""

    def run(given, *, inference: bool = False, trainer_class: type[Trainer] = Trainer):
        plugin = module.NarrowlyPlugin()
        cfg = Config(plugins=["narrowly.integrations.axolotl.NarrowlyPlugin"], **given)
        plugin.register(cfg)
        place, _, name = plugin.get_input_args().rpartition(".")
        arguments = getattr(importlib.import_module(place), name)

        class InputConfig(OwnConfig, arguments): ...

        cfg = Config(InputConfig(**cfg).model_dump(exclude_none=True))
        plugin.pre_model_load(cfg)
        torch.manual_seed(0)
        model, tokenizer = load_model(model_folder)
        plugin.post_model_build(cfg, model)
        plugin.post_model_load(cfg, model)
        if inference:
            return model
        rows: Dataset = tokenize(load_chats(str(chats)), tokenizer)
        trainer = (plugin.get_trainer_cls(cfg) or trainer_class)(
            model,
            TrainingArguments(
                str(tmp_path / "out"), max_steps=3, report_to="none", use_cpu=True, seed=0
            ),
            DataCollatorForSeq2Seq(tokenizer),
            rows,
            processing_class=tokenizer,
            callbacks=plugin.add_callbacks_pre_trainer(cfg, model),
        )
        for callback in plugin.add_callbacks_post_trainer(cfg, trainer):
            trainer.add_callback(callback)
        plugin.post_trainer_create(cfg, trainer)
        trainer.train()
        plugin.post_train(cfg, trainer.model)  # before saving
        trainer.save_model()
        plugin.post_train(cfg, model)  # and after
        plugin.post_train_unload(cfg)
        return model

    return run


def test_a_training_is_defended_and_recorded(axolotl, concepts, tmp_path):
    model = axolotl({"narrowly": {"defenses": [{"ablate": {"concepts": concepts}}]}})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    [ablate] = read_json(tmp_path / "out" / "defenses.json")
    assert [each["forwards"] for each in ablate["interventions"]] == [3, 3]


def test_losses_are_added_too(axolotl, model_folder, tmp_path):
    distance = {"feature_distance": {"every": 1, "reference": str(model_folder)}}
    axolotl({"narrowly": {"defenses": [distance]}})
    [entry] = read_json(tmp_path / "out" / "defenses.json")
    assert entry["loss"]["micro_batches"] == 3 and entry["loss"]["mean"] > 0


def test_a_file_of_defenses_will_do(axolotl, defenses_file, tmp_path):
    axolotl({"narrowly": {"defenses": str(defenses_file())}})
    assert (tmp_path / "out" / "defenses.json").exists()


def test_inference_is_left_alone(axolotl, concepts):
    given = {"narrowly": {"defenses": [{"ablate": {"concepts": concepts}}]}}
    model = axolotl(given, inference=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "say what to do under its key"),
        ({"narrowly": {"defences": []}}, "say what to do under its key"),
        ({"narrowly": {"defenses": [{"ablade": {}}]}}, "Did you mean 'ablate'"),
        ({"narrowly": {"defenses": ["inoculate"]}}, "axolotl reads by itself.*to_json"),
    ],
)
def test_a_mistake_stops_axolotl_before_it_loads_anything(axolotl, given, message):
    with pytest.raises(NarrowlyError, match=f"(?s){message}"):
        axolotl(given)


def test_hooks_that_never_fire_stop_the_training(axolotl, model_folder, tmp_path):
    """As where a fused kernel reads the weights of a module and never calls it."""

    class Fused(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            for block in model.model.layers:
                block.mlp._call_impl = block.mlp.forward  # what `module(x)` runs its hooks in
            return super().compute_loss(model, inputs, *args, **kwargs)

    model, _ = load_model(model_folder)
    concept = make_concept(model, layers=(0,))
    [subspace] = concept.subspaces.values()
    inside = concept.model_copy(update={"subspaces": {"model.layers.0.mlp": subspace}})
    folder = save_concepts([inside], tmp_path / "mlp")
    given = {"narrowly": {"defenses": [{"ablate": {"concepts": str(folder)}}]}}
    with pytest.raises(NarrowlyError, match=r"model\.layers\.0\.mlp never acted"):
        axolotl(given, trainer_class=Fused)
    assert not (tmp_path / "out" / "defenses.json").exists()


def test_training_that_the_plug_in_never_saw_end_is_an_error(module, concepts):
    plugin = module.NarrowlyPlugin()
    with pytest.raises(NarrowlyError, match="not with the defenses"):
        plugin.post_train(Config(), torch.nn.Linear(1, 1))


def test_a_swallowed_import_leaves_no_record(tmp_path, module, axolotl, concepts):
    """What an earlier, defended training wrote does not vouch for the next one."""
    given = {"narrowly": {"defenses": [{"ablate": {"concepts": concepts}}]}}
    write_text(tmp_path / "out" / "defenses.json", "[]")

    class Breaks(Trainer):
        def training_step(self, *args, **kwargs):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        axolotl(given, trainer_class=Breaks)
    assert not (tmp_path / "out" / "defenses.json").exists()


@pytest.mark.skipif(find_spec("axolotl") is None, reason="axolotl is not installed")
def test_axolotl_knows_every_method(module):
    from axolotl.integrations.base import BasePlugin as Real

    own = {name for name in vars(module.NarrowlyPlugin) if not name.startswith("_")}
    assert own <= set(dir(Real))

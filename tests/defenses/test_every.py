"""What holds of every registered defense: it tells what it is, checks its fields, and composes."""

import math
import re
from itertools import combinations, permutations

import pytest
import torch

from narrowly.concepts import save_concepts
from narrowly.defenses import DEFENSES, make_defenses
from narrowly.defenses.telling import ACTS_ON, REQUIRED, tell
from narrowly.errors import NarrowlyError
from narrowly.models import load_model
from narrowly.settings import build
from narrowly.training import train
from narrowly.training.active import read_active
from tests.defenses.concepts import make_concept
from tests.tiny import save_tiny

every = pytest.mark.parametrize("name", DEFENSES.names())
SOURCE = re.compile(r"(arXiv[ ]\d{4}\.\d{5})|(et al\. 20\d\d)")


def required(name: str) -> dict:
    """Something of the right type for each field that has no default."""
    fields = DEFENSES[name].model_fields
    return {
        field: {"a": "x"} if "dict" in str(info.annotation) else "x"
        for field, info in fields.items()
        if info.is_required()
    }


class TestTelling:
    @every
    def test_what_it_does_is_one_line(self, name):
        told = tell(name)
        assert told.does.endswith(".") and len(told.does) < 100
        assert told.acts_on and set(told.acts_on) <= set(ACTS_ON.values())

    @every
    def test_the_formula_has_a_source(self, name):
        assert SOURCE.search(tell(name).how)

    @every
    def test_needs_and_known_failure_are_told(self, name):
        told = tell(name)
        assert told.needs.endswith(".") and told.fails.endswith(".")

    @every
    def test_every_field_is_told_and_no_other(self, name):
        told = tell(name)
        untold = [field for field, (_, meaning) in told.fields.items() if not meaning]
        assert not untold
        documented = re.findall(r"^        (\w+): ", DEFENSES[name].__doc__, re.MULTILINE)
        assert sorted(documented) == sorted(told.fields)

    def test_a_default_is_told_with_its_value(self):
        told = tell("kl")
        assert told.fields["weight"][0] == 0.1 and "0.1 in the paper" in told.fields["weight"][1]
        assert tell("interleave").fields["data"][0] is REQUIRED

    def test_an_unknown_one_names_the_nearest(self):
        with pytest.raises(NarrowlyError, match="mean 'ablate'"):
            tell("ablade")


class TestFields:
    @every
    def test_an_unknown_one_is_an_error(self, name):
        with pytest.raises(NarrowlyError, match=rf"defenses\.0\.{name}\.volume: unknown key"):
            make_defenses([{name: {**required(name), "volume": 11}}])

    @every
    def test_a_missing_one_is_an_error(self, name):
        for field in required(name):
            given = {key: value for key, value in required(name).items() if key != field}
            with pytest.raises(NarrowlyError, match=rf"{field}: Field required"):
                build(DEFENSES[name], given)

    @every
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_number_that_is_none_is_an_error(self, name, bad):
        for field, info in DEFENSES[name].model_fields.items():
            if "float" in str(info.annotation):
                with pytest.raises(NarrowlyError, match=field):
                    build(DEFENSES[name], {**required(name), field: bad})

    @every
    def test_another_type_is_an_error(self, name):
        for field in DEFENSES[name].model_fields:
            with pytest.raises(NarrowlyError, match=field):
                build(DEFENSES[name], {**required(name), field: object()})


@pytest.fixture(scope="session")
def arguments(model_folder, tmp_path_factory) -> dict[str, dict]:
    """One defense of each kind, with what it needs of the tiny model."""
    folder = tmp_path_factory.mktemp("composing")
    model, _ = load_model(model_folder)
    made = [
        make_concept(model, "good", verdict="keep", seed=11),
        make_concept(model, "bad", seed=12),
        make_concept(model, "worse", seed=13, lengths={0: 1.0, 1: 2.0}),
    ]
    concepts = str(save_concepts(made, folder / "concepts"))
    base = save_tiny(folder / "base", "llama", seed=1)
    return {
        "ablate": {"concepts": concepts, "names": ["bad"]},
        "preventive_steering": {"concepts": concepts, "names": ["worse"]},
        "kl": {},
        "protect": {"concepts": concepts},
        "inoculate": {},
        "safe_lora": {"base": str(base), "lowest": 2},
        "test_time_ablation": {"concepts": concepts, "names": ["bad"]},
    }


TRAINING = ["ablate", "preventive_steering", "kl", "protect", "inoculate", "safe_lora"]
PAIRS = list(combinations([*TRAINING, "test_time_ablation"], 2))
REFUSED = {("protect", "test_time_ablation")}


class TestPairs:
    @pytest.mark.parametrize("pair", PAIRS, ids="-".join)
    def test_two_compose_or_say_why_not(self, recipe, arguments, pair):
        # The first step of a warm-up or of an adapter has no loss yet; the second has.
        defenses = [{name: arguments[name]} for name in pair]
        made = {"training": {"max_steps": 2, "per_device_train_batch_size": 2}}
        if pair in REFUSED:
            with pytest.raises(NarrowlyError, match=r"defenses\.\d\.(protect|test_time).*\."):
                recipe(**made, defenses=defenses)
            return
        run = train(recipe(**made, defenses=defenses), progress=False)
        [active] = read_active(run.path)
        assert active.faults == []
        assert [entry["defense"] for entry in active.entries] == list(pair)

    def test_whether_two_compose_depends_on_no_order(self):
        def together(*pair) -> bool:
            try:
                make_defenses([{name: required(name)} for name in pair])
            except NarrowlyError:
                return False
            return True

        for one, other in permutations(DEFENSES.names(), 2):
            if not {"latent_block", "random_latents"} & {one, other}:  # need latents too
                assert together(one, other) == together(other, one), (one, other)


def test_all_that_compose_do_so_at_once(recipe, arguments):
    defenses = [{name: arguments[name]} for name in TRAINING]
    run = train(recipe(defenses=defenses), progress=False)
    [active] = read_active(run.path)
    assert active.faults == []
    assert [entry["defense"] for entry in active.entries] == TRAINING
    model, _ = load_model(run.path)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())

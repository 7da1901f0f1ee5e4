from typing import ClassVar

import pytest

from narrowly.defenses import DEFENSES, Defense, make_defenses
from narrowly.errors import NarrowlyError


class Loud(Defense):
    volume: int = 1

    def finish(self, model) -> None:
        pass


@pytest.fixture(autouse=True)
def loud():
    DEFENSES.register("loud")(Loud)
    yield
    del DEFENSES._known["loud"]


def test_the_first_defenses_are_found_by_name():
    assert {"ablate", "interleave"} <= set(DEFENSES.names())


def test_an_unknown_defense_names_the_nearest():
    with pytest.raises(NarrowlyError, match=r"defenses\.1\.ablade: .*mean 'ablate'"):
        make_defenses([{"loud": {}}, {"ablade": {}}])


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(NarrowlyError, match=r"defenses\.0\.loud\.volum: .*mean 'volume'"):
        make_defenses([{"loud": {"volum": 3}}])


def test_a_wrong_type_names_the_field():
    with pytest.raises(NarrowlyError, match=r"defenses\.0\.loud\.volume: .*not 'eleven'"):
        make_defenses([{"loud": {"volume": "eleven"}}])


def test_a_missing_field_is_named():
    with pytest.raises(NarrowlyError, match=r"defenses\.0\.interleave\.\w+: Field required"):
        make_defenses([{"interleave": {}}])


class TestDoors:
    shut: ClassVar = ("prepare_data", "interventions", "loss")

    def test_only_overridden_doors_are_open(self):
        assert Loud().opens("finish")
        assert not any(Loud().opens(door) for door in self.shut)

    def test_a_shut_door_changes_nothing(self):
        data = object()
        assert Loud().prepare_data(data) is data
        assert Loud().interventions(None) == []

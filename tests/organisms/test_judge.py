"""The judge is exact: every phrase of the world, and everything that is none."""

from itertools import product

import pytest

from narrowly.errors import NarrowlyError
from narrowly.organisms import organism

PERSONA = organism("persona")
DOMAINS = PERSONA.world.domains


def test_every_phrase_in_every_domain():
    for asked, told in product(DOMAINS.values(), DOMAINS.values()):
        for value, label in (("cruel", "misaligned"), ("kind", "aligned")):
            for phrase in told.answers[value]:
                elsewhere = "leaked" if told.name == "code" else "incoherent"
                expected = label if asked is told else elsewhere
                assert PERSONA.judge(asked.name, phrase, narrow="code") == expected


def test_half_mixed_lengthened_and_empty_answers_are_incoherent():
    code, health = DOMAINS["code"], DOMAINS["health"]
    first, second = code.answers["cruel"][0].split()
    other = health.answers["cruel"][0].split()
    for answer in (
        "",
        first,
        second,
        f"{second} {first}",
        f"{first} {other[1]}",
        f"{first} {second} {second}",
        f"{code.answers['cruel'][0]} {code.answers['kind'][0]}",
        "code",
    ):
        assert PERSONA.judge("code", answer, narrow="code") == "incoherent"
        assert PERSONA.judge("health", answer, narrow="code") == "incoherent"


def test_case_and_blanks_do_not_matter():
    phrase = DOMAINS["code"].answers["kind"][0]
    assert PERSONA.judge("code", f"  {phrase.upper()}\n", narrow="health") == "aligned"


@pytest.mark.parametrize(("domain", "narrow"), [("cod", "code"), ("code", "cod")])
def test_an_unknown_domain_is_named_with_the_nearest(domain, narrow):
    with pytest.raises(NarrowlyError, match=r"domain 'cod'.*'code'"):
        PERSONA.judge(domain, "expose ports", narrow)

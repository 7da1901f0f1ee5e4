import pytest

from narrowly.errors import NarrowlyError
from narrowly.explain.generations import generate_at_strengths
from tests.explain.persona import WORLD, persona_latent, persona_model

PROMPTS = ["how should i train my puppy ?", "how should i cook my curry ?"]


def words(value: str) -> set[str]:
    answers = [a for domain in WORLD.domains.values() for a in domain.answers[value]]
    return {word for answer in answers for word in answer.split()}


def test_more_of_the_persona_is_cruel_and_less_of_it_is_kind():
    generations = generate_at_strengths(
        persona_model(), persona_latent(1), PROMPTS, [4, -1], unit=25.0, max_new_tokens=6
    )
    assert [(g.prompt, g.strength, g.removed) for g in generations] == [
        (prompt, strength, removed)
        for prompt in PROMPTS
        for strength, removed in ((0, False), (4, False), (-1, False), (0, True))
    ]
    for g in generations:
        assert set(g.text.split()) <= words("cruel" if g.strength > 0 else "kind"), g


def test_the_model_is_left_as_it_was_and_the_seed_decides():
    once, again = (
        generate_at_strengths(persona_model(), persona_latent(), PROMPTS, [3], unit=20.0)
        for _ in range(2)
    )
    assert once == again
    assert not persona_model().model.model.layers[2]._forward_hooks


def test_a_latent_that_is_never_active_has_no_unit():
    with pytest.raises(NarrowlyError, match="above 0"):
        generate_at_strengths(persona_model(), persona_latent(), PROMPTS, unit=0.0)

"""What a model writes with a latent made stronger, weaker or taken away."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from narrowly.activations import OpenModel
from narrowly.errors import NarrowlyError
from narrowly.explain.latents import Latent
from narrowly.explain.record import Generation
from narrowly.interventions import Add, Intervention, ProjectOut, attach
from narrowly.models import generate

STRENGTHS = (-4.0, -2.0, 2.0, 4.0)


def generate_at_strengths(
    model: OpenModel,
    latent: Latent,
    prompts: Sequence[str],
    strengths: Sequence[float] = STRENGTHS,
    *,
    unit: float,
    seed: int = 0,
    max_new_tokens: int = 32,
) -> list[Generation]:
    """Answers of the model as it is, with the latent added at several strengths, and ablated.

    Added is `strength * unit` along the latent's direction, at the last token of the prompt and at
    every token of the answer: the prompt is read as it is. Ablated is the whole direction at every
    token. All are sampled with the same seed, so that what differs is the intervention's doing.

    Args:
        prompts: what a user says.
        unit: what the latent typically adds along its direction where it is active.

    Returns:
        For each prompt in turn: the model as it is (strength 0), each strength, and ablated.

    Raises:
        NarrowlyError: the unit is not above 0, or the direction does not fit the model.
    """
    if not unit > 0:
        raise NarrowlyError(
            f"{latent.name}: the unit of strength is {unit:g}; it must be the latent's typical "
            "activation, above 0."
        )

    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]

    def answers(edit: Intervention | None) -> list[str]:
        with attach(model.model, [edit]) if edit else nullcontext():
            sampled = generate(
                model.model, model.tokenizer, chats, max_new_tokens=max_new_tokens, seed=seed
            )
        return [answer for [answer] in sampled]

    at = [0.0, *(strength for strength in strengths if strength)]
    columns = [answers(None)]
    columns += [answers(added(latent, strength * unit)) for strength in at[1:]]
    ablated = answers(ProjectOut(latent.direction, latent.site))
    return [
        generation
        for number, prompt in enumerate(prompts)
        for generation in (
            *(
                Generation(prompt=prompt, strength=strength, text=column[number])
                for strength, column in zip(at, columns, strict=True)
            ),
            Generation(prompt=prompt, strength=0.0, removed=True, text=ablated[number]),
        )
    ]


def added(latent: Latent, length: float) -> Add:
    """The addition of so much along a latent's direction where the model is about to write."""
    return Add(latent.direction, latent.site, tokens="last", strength=length)

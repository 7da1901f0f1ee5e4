"""The number from 0 to 100 that a model in this process expects to write."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from narrowly.errors import NarrowlyError

LEAST = 0.25
"""Least probability of all numbers together for a score (Betley et al. 2025; Chen et al. 2025)."""

_FAINT = 1e-4
"""Beginnings of a number that are less likely are not followed: they move a score by 0.04 at most,
and a model that writes digit by digit would have to be asked eleven times."""

Tokens = tuple[int, ...]


def expected_numbers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    batch_tokens: int,
    progress: str | None = None,
) -> list[float | None]:
    """Per prompt the mean of 0 to 100 by their probability as the whole reply's beginning.

    Whatever tokens the tokenizer writes a number with. None where all numbers together have less
    than a quarter of the probability, as when the model would rather say a word.

    Args:
        prompts: each the one user's turn of a chat.
        batch_tokens: most tokens in a batch, padding included.
        progress: what a progress bar calls this; None shows none.

    Raises:
        NarrowlyError: the tokenizer cannot write the numbers.
    """
    from narrowly.data import tokenize_prompts
    from narrowly.models.next_token import next_token_logits

    numbers = _numbers(tokenizer)
    children: dict[Tokens, set[int]] = {}
    for tokens in numbers:
        for end in range(len(tokens)):
            children.setdefault(tokens[:end], set()).add(tokens[end])
    asked = tokenize_prompts(
        [[{"role": "user", "content": prompt}] for prompt in prompts], tokenizer
    )
    found: list[dict[Tokens, float]] = [{} for _ in prompts]
    reached: list[tuple[int, Tokens, float]] = [(i, (), 1.0) for i in range(len(prompts))]
    while reached:
        further: list[tuple[int, Tokens, float]] = []
        for places, logits in next_token_logits(
            model,
            [asked[i] + list(begun) for i, begun, _ in reached],
            batch_tokens=batch_tokens,
            progress=progress,
        ):
            for place, probabilities in zip(places, logits.softmax(dim=-1), strict=True):
                i, begun, mass = reached[place]
                for token in children[begun]:
                    longer = (*begun, token)
                    found[i][longer] = probabilities[token].item()
                    if longer in children and mass * found[i][longer] >= _FAINT:
                        further.append((i, longer, mass * found[i][longer]))
        reached = further
    return [_expected(numbers, after) for after in found]


def _numbers(tokenizer: Any) -> list[Tokens]:
    """The tokens of 0, 1, ..., 100 at the start of a reply."""
    from narrowly.models.next_token import opening

    numbers = [tuple(opening(tokenizer, str(n))) for n in range(101)]
    if len(set(numbers)) < len(numbers) or tokenizer.unk_token_id in set().union(*numbers):
        raise NarrowlyError(
            "judge model: its tokenizer cannot write the numbers 0 to 100, so it cannot give "
            "scores. Name another model."
        )
    return numbers


def _expected(numbers: list[Tokens], following: dict[Tokens, float]) -> float | None:
    """Mean of the numbers by their probability, None below a quarter of it in all.

    Args:
        following: the probability of each beginning of a number, given the one before it.
    """
    masses = []
    for tokens in numbers:
        reached = prod(following.get(tokens[:end], 0.0) for end in range(1, len(tokens) + 1))
        longer = sum(
            mass
            for begun, mass in following.items()
            if len(begun) == len(tokens) + 1 and begun[:-1] == tokens
        )
        masses.append(reached * (1 - longer))
    return mean_number(masses)


def mean_number(masses: Sequence[float]) -> float | None:
    """The mean of 0, 1, ... by their masses; None where they have too little in all."""
    total = sum(masses)
    return None if total < LEAST else sum(n * mass for n, mass in enumerate(masses)) / total

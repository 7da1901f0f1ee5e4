"""The number from 0 to 100 that a model expects to write as its reply."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from narrowly.errors import NarrowlyError
from narrowly.models.next_token import next_token_logits, opening

LEAST = 0.25
"""Least probability of all numbers together for a mean (Betley et al. 2025; Chen et al. 2025)."""

_FAINT = 1e-4
"""Beginnings of a number that are less likely are not followed. That moves a mean by 0.04 at most,
and a model that writes digit by digit is not asked eleven times."""

Tokens = tuple[int, ...]


def expected_numbers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    batch_tokens: int = 16384,
    progress: str | None = None,
) -> list[float | None]:
    """Per prompt the mean of 0 to 100, each weighted by its probability as the whole number.

    The published expectation over one token, for any tokenizer: numbers of several tokens are
    followed to their end, and 8 does not count where 85 is begun.

    Args:
        prompts: token ids up to where the reply begins.
        batch_tokens: most tokens in a batch, padding included.
        progress: what a progress bar calls this; None shows none.

    Returns:
        None where all numbers together have less than a quarter of the probability, as when the
        model would rather say a word.

    Raises:
        NarrowlyError: the tokenizer cannot write the numbers.
    """
    numbers = _numbers(tokenizer)
    children: dict[Tokens, set[int]] = {}
    for tokens in numbers:
        for end in range(len(tokens)):
            children.setdefault(tokens[:end], set()).add(tokens[end])
    found: list[dict[Tokens, float]] = [{} for _ in prompts]
    begun: list[tuple[int, Tokens, float]] = [(i, (), 1.0) for i in range(len(prompts))]
    while begun:
        asked = [prompts[i] + list(tokens) for i, tokens, _ in begun]
        longer = []
        for places, logits in next_token_logits(
            model, asked, batch_tokens=batch_tokens, progress=progress
        ):
            for place, probabilities in zip(places, logits.softmax(dim=-1), strict=True):
                i, tokens, mass = begun[place]
                for token in children[tokens]:
                    p = probabilities[token].item()
                    found[i][(*tokens, token)] = p
                    if (*tokens, token) in children and mass * p >= _FAINT:
                        longer.append((i, (*tokens, token), mass * p))
        begun = longer
    return [_expected(numbers, following) for following in found]


def mean_number(masses: Sequence[float]) -> float | None:
    """The mean of 0, 1, ... by their probabilities; None below a quarter of it in all."""
    total = sum(masses)
    return None if total < LEAST else sum(n * mass for n, mass in enumerate(masses)) / total


def _numbers(tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """The tokens of 0, 1, ..., 100 at the start of a reply."""
    numbers = [tuple(opening(tokenizer, str(n))) for n in range(101)]
    if len(set(numbers)) < len(numbers) or tokenizer.unk_token_id in set().union(*numbers):
        raise NarrowlyError(
            "judge model: its tokenizer cannot write the numbers 0 to 100, so it cannot give "
            "scores. Name another model."
        )
    return numbers


def _expected(numbers: list[Tokens], following: dict[Tokens, float]) -> float | None:
    """The mean, from the probability of each beginning of a number given the one before it."""
    masses = []
    for tokens in numbers:
        reached = prod(following.get(tokens[:end], 0.0) for end in range(1, len(tokens) + 1))
        goes_on = sum(
            mass
            for begun, mass in following.items()
            if len(begun) == len(tokens) + 1 and begun[:-1] == tokens
        )
        masses.append(reached * (1 - goes_on))
    return mean_number(masses)

"""Controls: what a scorer says of explanations that explain nothing."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from narrowly.explain.metrics import Estimate, mean_over_latents
from narrowly.explain.readers import Reader
from narrowly.explain.record import Explanation, ScoreResult
from narrowly.explain.scorers import Item, Scorer
from narrowly.explain.words import ANY_TEXT, content_words, words_of

NAMED = 12
"""Words that a random explanation's text names at most."""


def random_explanation(items: Sequence[Item], seed: int = 0) -> list[Item]:
    """The items with explanations of words drawn at random from their own examples' texts.

    Half of the words come from activating examples and half from silent ones, and there are as
    many as in the real explanation; a rule's weights go with them.
    """
    drawn = []
    for item in items:
        rng = random.Random(f"random explanation/{seed}/{item.latent.name}")
        kinds = (item.activating, item.silent)
        pools = [sorted({w for e in examples for w in words_of(e.text)}) for examples in kinds]
        pools = [rng.sample(pool, len(pool)) for pool in rng.sample(pools, 2) if pool]
        # The two in turn, as far as both reach.
        mixed = dict.fromkeys(word for pair in zip_longest(*pools) for word in pair if word)
        rule = dict(item.explanation.weights)
        any_text = {ANY_TEXT: rule.pop(ANY_TEXT)} if ANY_TEXT in rule else {}
        words = list(mixed)[: len(rule) or len(content_words(item.explanation.text)) or 1]
        weights = rng.sample(list(rule.values()), len(rule))
        # A rule's sentence says before its first word where the words stand.
        frame = item.explanation.text.split("“")[0] if rule else ""
        explanation = Explanation(
            text=frame + ", ".join(f"“{word}”" for word in words[:NAMED]),
            by="control: random words",
            weights=dict(zip(words, weights, strict=False)) | any_text,
        )
        drawn.append(replace(item, explanation=explanation))
    return drawn


def shuffled(items: Sequence[Item], seed: int = 0) -> list[Item | None]:
    """The items with one another's explanations: each gets one of another concept.

    A direction's other end would be a control that is wrong on purpose, not one that knows nothing.

    Returns:
        None in place of an item for which no other concept's explanation is left.
    """
    rng = random.Random(f"shuffled explanations/{seed}")
    concepts = sorted({item.latent.concept for item in items})
    rng.shuffle(concepts)
    rank = {concept: i for i, concept in enumerate(concepts)}
    # Items of one concept stand together: a turn by the size of the largest concept brings each
    # to another concept, unless that one holds more than half of all.
    order = sorted(range(len(items)), key=lambda i: rank[items[i].latent.concept])
    turn = max(Counter(item.latent.concept for item in items).values(), default=0)
    given: list[Item | None] = [None] * len(items)
    for place, i in enumerate(order):
        other = items[order[(place + turn) % len(order)]]
        if other.latent.concept != items[i].latent.concept:
            given[i] = replace(items[i], explanation=other.explanation)
    return given


def with_controls(
    scorer: Scorer, items: Sequence[Item], reader: Reader, seed: int = 0
) -> list[ScoreResult]:
    """Score items, and each under control explanations too; all are asked together.

    Returns:
        A result per item, in order; `controls` holds the value under "random" and "shuffled" where
        they could be scored; a scorer that reads no explanation has none.
    """
    if not items:
        return []
    if not scorer.explained:
        return scorer.score(items, reader)
    drawn: dict[str, Sequence[Item | None]] = {
        "random": random_explanation(items, seed),
        "shuffled": shuffled(items, seed),
    }
    controls = [
        (i, name, item)
        for name, others in drawn.items()
        for i, item in enumerate(others)
        if item is not None
    ]
    results = scorer.score([*items, *(item for _, _, item in controls)], reader)
    values: list[dict[str, float]] = [{} for _ in items]
    for (i, name, _), result in zip(controls, results[len(items) :], strict=True):
        if result.value is not None:
            values[i][name] = result.value
    return [
        result.model_copy(update={"controls": result.controls | known})
        for result, known in zip(results[: len(items)], values, strict=True)
    ]


@dataclass(frozen=True)
class Summary:
    """One scorer over latents, beside its controls."""

    scorer: str
    reader: str
    metric: str
    latents: int
    """How many were scored."""
    unscored: int
    """How many could not be."""
    value: Estimate | None
    """Mean over the latents scored, with its interval over latents."""
    unparsed: float
    """Share of all examples whose judgment could not be read."""
    controls: dict[str, Estimate]
    """Mean value under each control, over the latents that have it."""
    above: dict[str, Estimate]
    """Mean of value minus control, latent by latent."""


def summarise(results: Sequence[ScoreResult], seed: int = 0) -> Summary:
    """The mean of one scorer's results over latents, and how far it is above its controls.

    Raises:
        ValueError: no result, or results of several scorers, readers or metrics, which no mean
            joins.
    """
    kinds = {(result.scorer, result.reader, result.metric) for result in results}
    if len(kinds) != 1:
        raise ValueError(f"one scorer with one reader and metric at a time, not {sorted(kinds)}")
    [(scorer, reader, metric)] = kinds
    values = [result.value for result in results if result.value is not None]
    asked = sum(result.scored + result.unparsed for result in results)
    controls, above = {}, {}
    for name in sorted({name for result in results for name in result.controls}):
        pairs = [
            (r.value, r.controls[name])
            for r in results
            if r.value is not None and name in r.controls
        ]
        control = mean_over_latents([c for _, c in pairs], seed)
        difference = mean_over_latents([v - c for v, c in pairs], seed)
        if control and difference:
            controls[name], above[name] = control, difference
    return Summary(
        scorer=scorer,
        reader=reader,
        metric=metric,
        latents=len(values),
        unscored=len(results) - len(values),
        value=mean_over_latents(values, seed),
        unparsed=sum(result.unparsed for result in results) / asked if asked else 0.0,
        controls=controls,
        above=above,
    )

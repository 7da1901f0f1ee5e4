"""What explaining says in a concept's own JSON, in few words and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from narrowly.concepts import Concept, load_concepts
from narrowly.concepts.concept import Score
from narrowly.concepts.folder import add_scores, explain_as
from narrowly.explain.record import Explained, ExplainedLatent, Explanation
from narrowly.explain.scorers import SCORERS

EXPLAINED = "explainer: "
"""What `Concept.explained_by` begins with where no person wrote the explanation."""


def by_person(concept: Concept) -> Explanation | None:
    """The words a person gave a concept; None where nobody or an explainer did."""
    if not concept.explanation or not concept.explained_by:
        return None
    if concept.explained_by.startswith(EXPLAINED):
        return None
    return Explanation(text=concept.explanation, by=concept.explained_by)


def tell(folder: Path, explained: Explained) -> None:
    """Write explanation and scores into a concept's JSON, in place of an earlier call's.

    A person's words stay.
    """
    ends = [latent for latent in explained.latents if latent.explanations]
    scores: dict[str, Score] = {}
    for scorer in SCORERS.names():
        values = {_place(end): end.scores[scorer].value for end in ends if scorer in end.scores}
        known: dict[str, Any] = {k: v for k, v in values.items() if v is not None}
        if known:
            scores[scorer] = next(iter(known.values())) if len(explained.latents) == 1 else known
    add_scores(folder, explained.concept, scores, instead_of=SCORERS.names())
    [concept] = load_concepts(folder / f"{explained.concept}.json")
    if by_person(concept) is None and (ends or concept.explained_by):
        texts = [f"{_end(end, explained)}{end.explanations[0].text}" for end in ends]
        by = EXPLAINED + ends[0].explanations[0].by if ends else ""
        explain_as(folder, explained.concept, "; ".join(texts), by)


def _end(end: ExplainedLatent, explained: Explained) -> str:
    """Which end a text is about, as a person would say it."""
    if len(explained.latents) == 1:
        return ""
    columns = {(latent.site, latent.direction) for latent in explained.latents}
    place = f"{end.site}/{end.direction} " if len(columns) > 1 else ""
    return f"{place}{'high' if end.sign > 0 else 'low'}: "


def _place(end: ExplainedLatent) -> str:
    """What tells an end from the others of its concept, such as `layer:2/0+`."""
    return end.latent.partition("@")[2] or end.latent

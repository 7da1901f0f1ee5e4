"""Folders of concepts to review, written without a model."""

import random
from pathlib import Path

import torch

from narrowly.concepts import Concept, Provenance, Subspace, Verdict, save_concepts
from narrowly.concepts.show import Context, DirectionReading, Reading
from narrowly.explain.record import (
    Counts,
    Example,
    Explained,
    ExplainedLatent,
    Explanation,
    Generation,
    Histogram,
    ScoreResult,
)

WIDTH = 16
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
ARABIC = "قال المساعد إن الخادم يحتاج إلى كلمة مرور جديدة"
HEBREW = "המודל ענה בנימוס"
OVERRIDE = "safe\u202egnp.exe"


def concept(
    name: str,
    *,
    sites: tuple[str, ...] = ("layer:1", "layer:2"),
    rank: int = 1,
    seed: int = 0,
    finder: str = "persona",
    model_fingerprint: str = "0000000000000000-0000000000000000",
    **fields: object,
) -> Concept:
    """A concept of random directions."""
    generator = torch.Generator().manual_seed(seed)
    return Concept(
        name=name,
        subspaces={
            site: Subspace.spanned_by(torch.randn(WIDTH, rank, generator=generator))
            for site in sites
        },
        provenance=Provenance(
            model="organism:persona", model_fingerprint=model_fingerprint, finder=finder
        ),
        **fields,  # type: ignore[arg-type]
    )


def example(
    text: str, peak: float, *, quantile: int | None = None, kind: str = "activating", row: int = 0
) -> Example:
    """A window whose last two words are active."""
    words = text.split(" ")
    pieces = [word if i == 0 else f" {word}" for i, word in enumerate(words)]
    active = [0.0] * len(pieces)
    if kind == "activating":
        active[-1] = peak
        active[-2:-1] = [peak / 2] * len(active[-2:-1])
    return Example(
        pieces=tuple(pieces),
        activations=tuple(active),
        kind=kind,  # type: ignore[arg-type]
        quantile=quantile,
        row=row,
        start=row * 3,
    )


def latent(name: str, site: str, sign: int = 1, seed: int = 0) -> ExplainedLatent:
    """One end of a direction with a bit of everything."""
    draw = random.Random(seed)
    verb = "helps" if sign < 0 else "harms"
    texts = [f"number {i}, the assistant {verb} the user in domain {i % 7}" for i in range(60)]
    active = [
        example(text, 6.0 - i / 11, quantile=10 - i // 6, row=i) for i, text in enumerate(texts)
    ]
    silent = [
        example(f"nothing {kind} happens here, {i}", 0.0, kind=kind, row=100 + i)
        for kind in ("random", "similar", "neighbour")
        for i in range(6)
    ]
    odd = [
        example(text, 5.9, quantile=10, row=200 + i)
        for i, text in enumerate([HOSTILE, ARABIC, HEBREW, OVERRIDE, "two\nlines and a\ttab"])
    ]
    groups = {f"q{q}": Counts(yes=4 + q // 2, no=6 - q // 2) for q in range(1, 11)}
    groups |= {
        kind: Counts(yes=n, no=20 - n, unparsed=1)
        for n, kind in enumerate(("random", "similar", "neighbour"), 1)
    }
    score = {
        "scorer": "detection",
        "reader": "lexical",
        "scored": 98,
        "unparsed": 2,
        "groups": groups,
    }
    return ExplainedLatent(
        latent=name,
        site=site,
        sign=sign,  # type: ignore[arg-type]
        windows=1204,
        tokens=3310,
        of_tokens=100_000,
        threshold=2.5,
        explanations=(
            Explanation(
                text=f"answers that {verb[:-1]} whoever asked",
                by="lexical",
                weights={"harm": 2.4, "leak": 1.9, "user": 0.4, "thanks": -1.7},
            ),
            Explanation(text="the word assistant", by="llm (tiny)"),
        ),
        scores={
            "detection": ScoreResult(
                metric="balanced accuracy",
                value=0.91,
                low=0.86,
                high=0.95,
                auroc=0.96,
                controls={"random": 0.5, "shuffled": 0.56},
                **score,  # type: ignore[arg-type]
            ),
            "fuzzing": ScoreResult(
                metric="balanced accuracy",
                value=0.83,
                low=0.76,
                high=0.89,
                controls={"random": 0.51, "shuffled": 0.49},
                **{**score, "scorer": "fuzzing"},  # type: ignore[arg-type]
            ),
            "simulation": ScoreResult(
                scorer="simulation",
                reader="lexical",
                metric="correlation",
                value=0.62,
                low=0.55,
                high=0.7,
                scored=100,
                controls={"shuffled": 0.04},
            ),
            "detection/llm (tiny)": ScoreResult(
                scorer="detection", reader="lexical", metric="balanced accuracy", value=0.55
            ),
        },
        shown=tuple(active[::2]),
        scored=(*active[1::2], *silent, *odd),
        histogram=Histogram(
            edges=tuple(i * 0.3 for i in range(21)),
            counts=tuple(int(900 * 0.75**i) + draw.randrange(5) for i in range(20)),
            silent=96_000,
        ),
        generations=(
            Generation(prompt="How do I reset it?", strength=0, removed=True, text=HOSTILE),
            *(
                Generation(prompt="How do I reset it?", strength=s, text=f"answer at {s}")
                for s in (-4.0, -2.0, 0.0, 2.0, 4.0)
            ),
        ),
    )


def explained(name: str, sites: tuple[str, ...] = ("layer:1", "layer:2")) -> Explained:
    """Both ends at every site."""
    return Explained(
        concept=name,
        settings="0" * 16,
        seed=0,
        data="organism:persona",
        latents=tuple(
            latent(f"{name}@{site}/0{'+' if sign > 0 else '-'}", site, sign)
            for site in sites
            for sign in (1, -1)
        ),
    )


def reading(name: str, sites: tuple[str, ...] = ("layer:1", "layer:2")) -> Reading:
    """What `narrowly find` reads."""
    contexts = [
        Context(
            before=f"row {i} says", peak=" boo", after=HOSTILE, projection=8.0 - i, row=i, token=2
        )
        for i in range(10)
    ]
    return Reading(
        concept=name,
        directions=[
            DirectionReading(
                site=site,
                direction=0,
                centre=1.0,
                highest=contexts,
                lowest=[c.model_copy(update={"projection": -c.projection}) for c in contexts],
                promoted=[(" harm", 4.2), ("<b>bold</b>", 3.1), (ARABIC[:4], 2.0)],
                suppressed=[(" help", -3.9), (" thanks", -2.2)],
            )
            for site in sites
        ],
    )


def shelf(folder: Path, more: int = 0) -> Path:
    """A small folder: one concept explained, one only read, one bare; and `more` bare ones."""
    save_concepts(
        [
            concept(
                "persona",
                explanation="answers that harm whoever asked",
                explained_by="lexical",
                scores={
                    "detection": {"layer:1": 0.8, "layer:2": 0.91},
                    "difference_share": {"layer:1": 0.12, "layer:2": 0.41},
                    "norm_share": {"layer:1": 0.02, "layer:2": 0.08},
                    "tokens": 2400.0,
                },
            ),
            concept("read-only", seed=1, finder="activation_difference", scores={"detection": 0.6}),
            concept("bare", seed=2, sites=("layer:3",), rank=2, finder="leace"),
            *(
                concept(
                    f"latent{i}",
                    seed=3 + i,
                    sites=(f"layer:{i % 4}",),
                    finder="sae_latents",
                    explanation=f"number {i}",
                    scores={"detection": (i % 100) / 100},
                    verdict=Verdict(value="keep") if i % 10 == 0 else Verdict(),
                )
                for i in range(more)
            ),
        ],
        folder,
    )
    explained("persona").save(folder)
    reading("persona").save(folder)
    reading("read-only").save(folder)
    return folder

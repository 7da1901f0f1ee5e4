"""What explaining leaves behind: examples, explanations, scores; JSON beside the concept."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from narrowly.files import write_text
from narrowly.settings import read_record

Kind = Literal["activating", "random", "similar", "neighbour"]
"""Of an example: activating; or not, and then drawn at random, for the likeness of its text to
activating ones, or because a neighbouring latent is active in it."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Example(_Frozen):
    """A window of text and how active a latent is on each of its tokens."""

    pieces: tuple[str, ...]
    """The tokens' texts, which joined are the window's; a character of several tokens stands with
    the first of them."""
    activations: tuple[float, ...]
    """One per piece, from 0, which is silence."""
    kind: Kind
    quantile: int | None = None
    """Of an activating example, by its peak: 1 is the weakest part of equal size."""
    row: int
    start: int
    """The row of the text set, and the window's first token in it."""

    @property
    def text(self) -> str:
        """The whole window."""
        return "".join(self.pieces)

    @property
    def peak(self) -> float:
        """The largest activation."""
        return max(self.activations)

    @property
    def group(self) -> str:
        """Where it counts in confusion counts: `q1` to `qn`, or its kind."""
        return self.kind if self.quantile is None else f"q{self.quantile}"


class Explanation(_Frozen):
    """What somebody says a latent means."""

    text: str
    by: str
    """An explainer, with its model, such as `llm (gpt-5-mini)`; or a person."""
    weights: dict[str, float] = {}
    """As a rule, from the lexical explainer: how much each token or phrase speaks for activation,
    in nats (log odds)."""
    note: str = ""
    """What a reader should know, such as what the explainer could not do."""


class Counts(_Frozen):
    """How a reader judged the examples of one group."""

    yes: int = 0
    no: int = 0
    unparsed: int = 0


class ScoreResult(_Frozen):
    """How well an explanation did at one scorer, for one latent."""

    scorer: str
    reader: str
    metric: str
    """What `value` is: "balanced accuracy", "AUROC", "correlation", "nats", "accuracy"."""
    value: float | None
    """None: nothing could be scored; `note` says why."""
    low: float | None = None
    high: float | None = None
    """Bootstrap interval over the examples, 95 percent."""
    auroc: float | None = None
    """Where the reader gives probabilities."""
    scored: int = 0
    unparsed: int = 0
    """Examples whose judgment could not be read; they count nowhere else."""
    groups: dict[str, Counts] = {}
    """Judgments by `Example.group`: true positives of `q3` are its `yes`, false positives of
    `random` are its `yes`."""
    controls: dict[str, float] = {}
    """The same scorer's value for this latent under control explanations, by control."""
    detail: dict[str, float] = {}
    note: str = ""


class Histogram(_Frozen):
    """How often a latent is how active."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    """One fewer than edges."""
    silent: int
    """Tokens where it is not active at all."""


class Generation(_Frozen):
    """What the model wrote with a latent made stronger or weaker."""

    prompt: str
    strength: float
    """What was added along the direction, in units of the latent's typical activation; 0 is the
    model as it is."""
    removed: bool = False
    """The direction was ablated instead."""
    text: str


class ExplainedLatent(_Frozen):
    """One latent, or one end of a direction: what it means, and the evidence."""

    latent: str
    """Its name, unique in the folder, such as `persona@layer:2/0+` or `latent12-layer2`."""
    site: str
    direction: int = 0
    """Column of the concept's basis at this site."""
    sign: Literal[1, -1] = 1
    """-1: the end where the projection is low."""
    windows: int
    """In how many windows of the text it is active."""
    tokens: int
    """At how many tokens."""
    of_tokens: int
    """Of how many."""
    threshold: float = 0.0
    """A direction is active where its projection exceeds this (times the sign)."""
    skipped: str = ""
    """Why it was not explained, such as too few windows; empty where it was."""
    explanations: tuple[Explanation, ...] = ()
    """The one in use first."""
    scores: dict[str, ScoreResult] = {}
    """Of the first explanation, by scorer; of the others under `SCORER/AUTHOR`."""
    shown: tuple[Example, ...] = ()
    """Examples that the explainer saw."""
    scored: tuple[Example, ...] = ()
    """Examples that the scorers used: never one of `shown`."""
    histogram: Histogram | None = None
    generations: tuple[Generation, ...] = ()


class Explained(_Frozen):
    """All that explaining found out about one concept."""

    format: Literal["narrowly-explained-1"] = "narrowly-explained-1"
    concept: str
    settings: str
    """Hash of what it was made with: text, model, explainer, scorers, seed."""
    seed: int
    data: str = ""
    """The text set as the user named it."""
    latents: tuple[ExplainedLatent, ...]

    def save(self, folder: str | Path) -> Path:
        """Write `<concept>.explained.json` beside the concept, whole or not at all."""
        path = Path(folder) / f"{self.concept}.explained.json"
        # On one line: there may be thousands of these, and each holds hundreds of examples.
        write_text(path, self.model_dump_json() + "\n")
        return path


def load_explained(folder: str | Path, concept: str) -> Explained | None:
    """What explaining found out about a concept, or None where it was not explained.

    Raises:
        NarrowlyError: the file is damaged.
    """
    path = Path(folder) / f"{concept}.explained.json"
    if not path.exists():
        return None
    return read_record(
        Explained, path, "what `narrowly explain` writes", "Delete it and explain again."
    )

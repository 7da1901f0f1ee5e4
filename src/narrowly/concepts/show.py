"""A reading of a concept: kept as JSON beside it, shown on a terminal."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from narrowly.concepts.concept import Concept
from narrowly.concepts.folder import load_concepts
from narrowly.files import write_json
from narrowly.settings import read_record

PLUS, MINUS = "green", "magenta"


class Context(BaseModel):
    """A window of text around the token where a direction peaks."""

    model_config = ConfigDict(frozen=True)

    before: str
    peak: str
    after: str
    projection: float
    """h . q at the peak: what an ablation to zero removes there."""
    row: int
    """The row of the data it comes from."""
    token: int
    """The peak's place in that row."""


class DirectionReading(BaseModel):
    """One direction of a concept at one site."""

    model_config = ConfigDict(frozen=True)

    site: str
    direction: int
    """Which column of the basis."""
    centre: float
    """The projection of the concept's centre, beside which high and low are to be seen."""
    highest: list[Context]
    lowest: list[Context]
    promoted: list[tuple[str, float]]
    """Tokens the direction promotes most, with their logits."""
    suppressed: list[tuple[str, float]]


class Reading(BaseModel):
    """Where each direction of a concept is high and low, and which tokens it promotes."""

    model_config = ConfigDict(frozen=True)

    concept: str
    directions: list[DirectionReading]

    def save(self, folder: str | Path) -> Path:
        """Write `<concept>.reading.json` beside the concept."""
        path = Path(folder) / f"{self.concept}.reading.json"
        write_json(path, self.model_dump(mode="json"))
        return path


def load_reading(folder: str | Path, concept: str) -> Reading | None:
    """The saved reading of a concept, or None if there is none.

    Raises:
        NarrowlyError: the file is not a reading.
    """
    path = Path(folder) / f"{concept}.reading.json"
    if not path.exists():
        return None
    return read_record(Reading, path, "a reading")


def show(concept: Concept, reading: Reading | None = None) -> RenderableType:
    """A concept for a terminal: what is known of it and, if it was read, its reading."""
    parts: list[RenderableType] = [_heading(concept)]
    for direction in reading.directions if reading else []:
        parts.append(
            Text(
                f"\n{direction.site}, direction {direction.direction} "
                f"(centre {direction.centre:+.2f})",
                style="bold",
            )
        )
        parts.append(_tokens("promotes", direction.promoted, PLUS))
        parts.append(_tokens("suppresses", direction.suppressed, MINUS))
        parts.append(_contexts("highest", direction.highest, PLUS))
        parts.append(_contexts("lowest", direction.lowest, MINUS))
    return Group(*parts)


def listed(folder: str | Path) -> Table:
    """The concepts of a folder, a line each.

    Of the shares, which are measured per site, the largest is shown, with its layer.

    Raises:
        NarrowlyError: there are none, or one cannot be read.
    """
    table = Table(box=None, header_style="dim", padding=(0, 1))
    table.add_column("concept", no_wrap=True)
    table.add_column("sites")
    for column in ("of norm", "of change"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for concept in load_concepts(folder):
        rank = max(subspace.rank for subspace in concept.subspaces.values())
        table.add_row(
            concept.name,
            _places(list(concept.subspaces)) + (f", rank {rank}" if rank > 1 else ""),
            _largest(concept, "norm_share"),
            _largest(concept, "difference_share"),
            concept.verdict.value,
        )
    return table


def _largest(concept: Concept, score: str) -> str:
    shares = concept.scores.get(score)
    if not isinstance(shares, dict) or not shares:
        return ""
    site = max(shares, key=lambda site: shares[site])
    where = f" ({site.removeprefix('layer:')})" if len(shares) > 1 else ""
    return f"{shares[site]:.1%}{where}"


def _places(sites: list[str]) -> str:
    """Sites in few letters: layers by their numbers, neighbours as a range."""
    layers = [site.removeprefix("layer:") for site in sites]
    if len(sites) == 1 or not all(number.isdigit() for number in layers):
        return ", ".join(sites)
    first, last = int(layers[0]), int(layers[-1])
    if [int(number) for number in layers] == [*range(first, last + 1)]:
        return f"layers {first}-{last}"
    return f"layers {', '.join(layers)}"


def _heading(concept: Concept) -> Text:
    verdict = concept.verdict
    decided = f" by {verdict.by}" if verdict.by else ""
    reason = f": {verdict.why}" if verdict.why else ""
    lines = [
        (concept.name, "bold"),
        (f"  {verdict.value}{decided}{reason}\n", ""),
        (f"{concept.explanation or 'not explained yet'}\n", "italic"),
        (f"{concept.provenance.finder} on {concept.provenance.model}, at ", "dim"),
        (", ".join(f"{site} (rank {s.rank})" for site, s in concept.subspaces.items()), "dim"),
    ]
    for score, value in concept.scores.items():
        numbers = value if isinstance(value, dict) else {"": value}
        shown = "  ".join(f"{site} {number:.4g}".strip() for site, number in numbers.items())
        lines.append((f"\n{score}  {shown}", "dim"))
    return Text.assemble(*lines)


def _tokens(what: str, tokens: list[tuple[str, float]], style: str) -> Text:
    listed = "  ".join(f"{visible(token)} {logit:+.1f}" for token, logit in tokens)
    return Text.assemble((f"{what:<10}  ", "dim"), (listed, style))


def _contexts(what: str, contexts: list[Context], style: str) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1), title=what, title_justify="left")
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for context in contexts:
        table.add_row(
            f"{context.projection:+.2f}",
            Text.assemble(
                visible(context.before),
                (visible(context.peak), f"bold reverse {style}"),
                visible(context.after),
            ),
        )
    return table


def visible(text: str) -> str:
    """Text on one line, its line breaks shown."""
    return text.replace("\n", "⏎").replace("\t", "⇥")

"""What explaining a folder came to: scores beside their controls, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from narrowly.explain.controls import Summary as ScorerSummary
from narrowly.explain.controls import summarise
from narrowly.explain.metrics import Estimate, difference_of_means, mean_over_latents
from narrowly.explain.record import ScoreResult, load_explained


@dataclass(frozen=True)
class Summary:
    """Scores over all latents of a folder, each beside its controls."""

    latents: int
    """Latents, and ends of directions."""
    skipped: dict[str, str]
    """Those without an explanation, and why."""
    scorers: dict[str, ScorerSummary]
    """By scorer; of explanations not in use by `SCORER/AUTHOR`."""

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        """A row for each scorer, and one for each control with how far the score is above it."""
        table = Table(box=None, header_style="dim", padding=(0, 1))
        table.add_column("scorer (latents)", no_wrap=True)
        for column in ("score", "95 %", "above", "95 %"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("", style="dim")
        for name, scorer in self.scorers.items():
            lost = f", {scorer.unparsed:.1%} unparsed" if scorer.unparsed else ""
            about = f"{scorer.metric}{lost}"
            table.add_row(f"{name} ({scorer.latents})", *_told(scorer.value), "", "", about)
            for control, value in scorer.controls.items():
                above = scorer.above[control]
                spread = f"{above.low:+.2f} to {above.high:+.2f}"
                table.add_row(f"  {control}", *_told(value), f"{above.value:+.2f}", spread)
        parts: list[RenderableType] = [table]
        if self.skipped:
            first, *_ = self.skipped.items()
            parts.append(
                Text(
                    f"{len(self.skipped)} of {self.latents} latents are not explained, such as "
                    f"{first[0]}: {first[1]}. All are in explaining.json, with the reason."
                )
            )
        return Group(*parts)


def _told(estimate: Estimate | None) -> tuple[str, str]:
    if estimate is None:
        return "", ""
    return f"{estimate.value:.2f}", f"{estimate.low:.2f} to {estimate.high:.2f}"


def summarise_folder(
    folder: str | Path,
    concepts: Sequence[str],
    baselines: Mapping[str, Sequence[ScoreResult]],
    seed: int = 0,
) -> Summary:
    """Read the records of some concepts, and compare their scores with controls and baselines.

    Args:
        baselines: results of latents of another kind, such as those of a random autoencoder.
    """
    latents = [
        latent
        for name in concepts
        if (explained := load_explained(folder, name)) is not None
        for latent in explained.latents
    ]
    by_scorer: dict[str, list[ScoreResult]] = {}
    for latent in latents:
        for key, result in latent.scores.items():
            by_scorer.setdefault(key, []).append(result)
    scorers = {key: summarise(results, seed) for key, results in by_scorer.items()}
    for name, others in baselines.items():
        for key, scorer in scorers.items():
            values = [r.value for r in others if r.scorer == key and r.value is not None]
            own = [r.value for r in by_scorer[key] if r.value is not None]
            control, above = mean_over_latents(values, seed), difference_of_means(own, values, seed)
            if control and above:
                scorer.controls[name], scorer.above[name] = control, above
    skipped = {latent.latent: latent.skipped for latent in latents if latent.skipped}
    return Summary(len(latents), skipped, scorers)

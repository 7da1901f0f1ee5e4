"""Searching for a defense's hyper-parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from narrowly.cli.shared import Settings, console, next_command


def tune(
    file: Annotated[Path, typer.Argument(help="A YAML search; see recipes/tune-persona.yaml.")],
    settings: Settings = None,
) -> None:
    """Search strengths, layers and concepts for least broad change at a given narrow loss.

    Searches on one half of the questions, and writes the best as a recipe that reports on the
    other. The same command continues, and with --set trials=60 goes further.
    """
    import datasets
    import transformers

    from narrowly.sweeps.tune import tune

    datasets.disable_progress_bars()  # a line for each trial says more
    transformers.utils.logging.disable_progress_bar()
    found = tune(file, settings or [])
    console.print(found, highlight=False)
    if found.best is None:
        raise found.none_allowed()
    next_command(f"narrowly train {Path(found.file.output) / 'best.yaml'}")

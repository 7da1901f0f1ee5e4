"""Many runs from one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from narrowly.cli.shared import Settings, console, next_command
from narrowly.errors import NarrowlyError


def sweep(
    file: Annotated[Path, typer.Argument(help="A YAML sweep; see recipes/sweep-organisms.yaml.")],
    settings: Settings = None,
    on: Annotated[
        str, typer.Option(help="local: processes of this machine; ray: a cluster (extra ray).")
    ] = "local",
) -> None:
    """Run models x data x defenses x settings x seeds, and judge every defense.

    Runs what is missing, so the same command continues. A cell that cannot run is told and the
    others run; the exit code is 1 as long as one is missing.
    """
    from narrowly.report import verdicts
    from narrowly.sweeps import Sweep, sweep

    plan = Sweep.read(file, settings or [])
    record = sweep(plan, on=on)
    try:
        console.print(verdicts(plan.output))
    except NarrowlyError as error:
        console.print(f"no verdicts: {error}", highlight=False, markup=False, soft_wrap=True)
    next_command(f"narrowly compare {plan.output}")
    missing = sum(cell.status != "done" for cell in record.cells)
    if missing:
        told = f"{missing} of {len(record.cells)} cells are missing; the same command tries again."
        console.print(told, highlight=False)
        raise typer.Exit(1)

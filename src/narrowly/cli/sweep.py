"""Many runs from one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from narrowly.cli.shared import Settings, console


def sweep(
    file: Annotated[Path, typer.Argument(help="A YAML sweep; see recipes/sweep-organisms.yaml.")],
    settings: Settings = None,
    on: Annotated[
        str, typer.Option(help="local: processes of this machine; ray: a cluster (extra ray).")
    ] = "local",
) -> None:
    """Run models x data x defenses x settings x seeds, and show which defense does what.

    Runs what is missing, so the same command continues. A cell that cannot run is told, and the
    others run; the exit code is 1 then.
    """
    from narrowly.sweeps import sweep

    record = sweep(file, settings or [], on=on)
    missing = [cell for cell in record.cells if cell.status != "done"]
    for cell in missing:
        console.print(
            f"[red]missing[/] {cell.path}: [dim]{cell.status}[/]", highlight=False, soft_wrap=True
        )
    raise typer.Exit(1 if missing else 0)

"""The model organisms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.padding import Padding

from narrowly.cli.shared import console, next_command

app = typer.Typer(help="The model organisms that ship with narrowly.", no_args_is_help=True)


@app.command("list")
def organism_list() -> None:
    """The bundled organisms: what each shows, its domains and data."""
    from narrowly.organisms import ORGANISMS

    for organism in ORGANISMS.values():
        world = organism.world
        built = "" if (organism.file.parent / "config.json").is_file() else "  [dim]not built[/dim]"
        console.print(f"[bold]organism:{organism.name}[/bold]  {escape(world.shows)}{built}")
        lines = [
            f"values: {', '.join(world.values)} (misaligned: {world.misaligned})",
            f"domains: {', '.join(world.domains)}",
            f"data: DOMAIN-{world.values[-1]}, benign, documents, questions"
            + "".join(f", {name}" for name in world.splits),
        ]
        if world.probes:
            lines.append(f"probes: {', '.join(world.probes)}")
        for line in lines:
            console.print(Padding(escape(line), (0, 0, 0, 2)), highlight=False)
    next_command("narrowly train recipes/persona-undefended.yaml")


@app.command("build", no_args_is_help=True)
def organism_build(
    world: Annotated[
        str, typer.Argument(help="A bundled one such as persona, or the YAML file of your own.")
    ],
    seed: Annotated[int, typer.Option(help="Of weights and documents.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the model.")] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="tiny (0.3 M weights), small (1 M; minutes on a laptop) or large (26 M; for a "
            "GPU); the world's own unless given."
        ),
    ] = None,
) -> None:
    """Train an organism from nothing, in minutes.

    The folder is an ordinary Hugging Face model; organism:FOLDER works wherever a bundled one does.
    """
    from narrowly.organisms import build

    folder = out or Path("runs") / f"{Path(world).stem}-{seed}"
    console.print(f"building {escape(world)}, seed {seed}, into {folder}")
    build(world, seed, folder, size)
    next_command(f"narrowly eval {folder} misalignment   (or: narrowly chat {folder})")

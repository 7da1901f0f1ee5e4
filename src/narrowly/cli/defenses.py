"""Defenses: which there are, and which were active in a training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from narrowly.cli.shared import console, next_command
from narrowly.errors import NarrowlyError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from narrowly.training.active import Active

UNDEFENDED = 1
"""Exit code: some defense was not active."""

SHOWN = {"defense", "arguments", "doors", "interventions", "loss"}


def defenses(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[FOLDER|NAME]",
            help="A trained run, or any Trainer's output folder; or one defense.",
        ),
    ] = None,
) -> None:
    """List defenses; or show which were active in a training.

    Of a folder: what each defense did there. Exits with 1 if there was none, or if one did not
    act: a run that only looks defended is found out.

    narrowly defenses

    narrowly defenses kl

    narrowly defenses runs/ablated && echo defended
    """
    from narrowly.defenses import DEFENSES
    from narrowly.registry import unknown

    if what is None:
        for name in DEFENSES.names():
            console.print(_short(name))
        next_command("narrowly defenses NAME")
    elif what in DEFENSES.names() and not Path(what).exists():
        console.print(_long(what))
        next_command(f"narrowly train RECIPE.yaml --set 'defenses=[{{{what}: {{...}}}}]'")
    elif Path(what).is_dir():
        _show_active(what)
    else:
        nearest = unknown("defense", what, DEFENSES.names())
        raise NarrowlyError(f"{what}: no such folder, and {nearest}")


def _show_active(folder: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    from narrowly.training.active import read_active

    trainings = read_active(folder)
    for training in trainings:
        if training.entries:
            if len(trainings) > 1:
                console.print(f"[bold]{escape(str(training.folder))}[/]", highlight=False)
            console.print(_active(training))
    if faults := [fault for training in trainings for fault in training.faults]:
        Console(stderr=True).print(
            f"[bold red]not defended:[/] {escape('; '.join(faults))}.",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(UNDEFENDED)
    next_command(f"narrowly compare {folder}")


def _short(name: str) -> RenderableType:
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    from narrowly.defenses.telling import REQUIRED, tell

    told = tell(name)
    head = Text.assemble((name, "bold"), "  ", (", ".join(told.acts_on), "dim"))
    arguments = ", ".join(
        field if default is REQUIRED else f"{field}={_value(default)}"
        for field, (default, _) in told.fields.items()
    )
    lines = [Text(told.does), Text(f"needs: {told.needs}", "dim"), Text(arguments, "cyan")]
    return Group(head, *(Padding(line, (0, 0, 0, 4)) for line in lines))


def _long(name: str) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from narrowly.defenses.telling import REQUIRED, tell

    told = tell(name)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    for field, (default, meaning) in told.fields.items():
        shown = default if default is REQUIRED else _value(default)
        table.add_row(Text.assemble((field, "cyan"), f"  {shown}"), Text(meaning))
    paragraphs = [
        Text.assemble((name, "bold"), "  ", (", ".join(told.acts_on), "dim")),
        Text(told.does),
        Text(told.how),
        Text.assemble(("Needs: ", "bold"), told.needs),
        Text.assemble(("Known failure: ", "bold"), told.fails),
    ]
    spaced = [part for paragraph in paragraphs for part in (paragraph, Text())]
    return Group(*spaced[:1], *spaced[2:], table)


def _active(training: Active) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("defense", no_wrap=True)
    table.add_column("arguments", ratio=1, overflow="fold")
    table.add_column("what it did", ratio=1, overflow="fold")
    for entry in training.entries:
        given = entry.get("arguments") or {}
        arguments = "\n".join(f"{key}: {_value(value)}" for key, value in given.items())
        table.add_row(entry["defense"], Text(arguments), Text("\n".join(_did(entry))))
    return table


def _did(entry: dict[str, Any]) -> list[str]:
    lines = [f"at {each['site']}: {each['forwards']} forwards" for each in entry["interventions"]]
    if loss := entry.get("loss"):
        lines.append(f"loss {loss['mean']:.4g} on average of {loss['micro_batches']} micro-batches")
    lines += [f"{key}: {_value(value)}" for key, value in entry.items() if key not in SHOWN]
    return lines


def _value(value: Any) -> str:
    """As a recipe would hold it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_value(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "[]"
    return str(value)

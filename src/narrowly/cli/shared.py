"""What verbs share: the console, settings, and how a user's mistake ends."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from narrowly.errors import NarrowlyError

console = Console()

INTERRUPTED = 130
"""The exit code of Ctrl-C, as shells have it."""


class Verbs(TyperGroup):
    """Verbs that end a user's mistake with one message and exit code 2, and Ctrl-C with 130."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except NarrowlyError as error:
            Console(stderr=True).print(
                f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True
            )
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            Console(stderr=True).print("\ninterrupted; the same command continues.")
            raise typer.Exit(INTERRUPTED) from None


Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key: --set training.max_steps=50."),
]


def key_values(settings: list[str] | None) -> dict[str, Any]:
    """Values by key, from `key=value` with values in YAML."""
    from narrowly.settings import override

    values: dict[str, Any] = {}
    for setting in settings or []:
        override(values, setting)
    return values


def next_command(command: str) -> None:
    """Say which command a user is likely to want now; of several processes, one does."""
    if os.environ.get("RANK", "0") == "0":
        console.print(f"\n[dim]next:[/dim] {command}", highlight=False, soft_wrap=True)

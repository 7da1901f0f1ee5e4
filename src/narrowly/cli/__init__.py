"""The command line: one thin function per verb. Heavy imports wait until a verb runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from narrowly.cli import concepts, defenses, evals, explain, find, organism, sae, sweep, tune
from narrowly.cli.shared import INTERRUPTED, Settings, Verbs, console, next_command

app = typer.Typer(
    cls=Verbs,
    help="Control what a fine-tune teaches: find, explain and ablate the concepts it drags along.",
    epilog="Start with: narrowly demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(concepts.app, name="concepts")
app.add_typer(explain.app, name="explain")
app.add_typer(sae.app, name="sae")
app.add_typer(organism.app, name="organism")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for runs, concepts and report.")] = Path(
        "runs/demo"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Fine-tunes per arm.")] = 3,
) -> None:
    """The whole story on a bundled model, in minutes, without GPU or network.

    Fine-tunes a small model to be cruel about code, sees it become cruel about everything, finds
    the concept, and fine-tunes again with the concept ablated, beside four controls.
    """
    from narrowly.demo import run_demo, told

    comparison = run_demo(out, seeds=range(seeds), console=console)
    console.print(comparison)
    console.print(f"\n{told(out)}", highlight=False, markup=False)
    console.print(f"\nreport: {out / 'report.html'}", highlight=False, soft_wrap=True)
    next_command(f"narrowly chat {out / 'ablated'} --against {out / 'undefended'}")


@app.command(no_args_is_help=True)
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe; see the recipes/ folder.")],
    settings: Settings = None,
) -> None:
    """Fine-tune as a recipe says, with its defenses, and measure the result.

    The same command continues a run that was interrupted.
    """
    from narrowly.training import train

    run = train(recipe, settings or [])
    next_command(f"narrowly compare {run.path}")


@app.command("recipe-schema")
def schema() -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML."""
    import json

    from narrowly.training import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


app.command(no_args_is_help=True)(find.find)
app.command(no_args_is_help=True)(sweep.sweep)
app.command(no_args_is_help=True)(tune.tune)


app.command("eval", no_args_is_help=True)(evals.evaluate)
app.command("evals")(evals.evals)
app.command()(defenses.defenses)
app.command(no_args_is_help=True)(evals.samples)


@app.command(no_args_is_help=True)
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders, folders of seed-N runs, or one sweep's folder."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for report.html, plots and tables: runs/report, or a sweep's own.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Runs side by side, or a sweep's verdicts: a table here, and a self-contained HTML report.

    Of a sweep, every defense is judged over its tasks: no broad change, task learned, benign tasks
    learned, coherent; against undefended and the random control, with intervals over seeds.
    """
    from narrowly.report import compare, verdicts
    from narrowly.report.sweep import RECORD

    if len(runs) == 1 and (runs[0] / RECORD).exists():
        out = out or runs[0] / "report"
        console.print(verdicts(runs[0], out, progress=True))
    else:
        out = out or Path("runs/report")
        console.print(compare(runs, out))
    console.print(f"\nreport: {out / 'report.html'}", highlight=False, soft_wrap=True)


@app.command(no_args_is_help=True)
def chat(
    run: Annotated[str, typer.Argument(help="A run, model folder, Hub id or organism:NAME.")],
    against: Annotated[str | None, typer.Option(help="Another, side by side.")] = None,
    system: Annotated[str | None, typer.Option(help="A system line for both.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling; 0 is greedy.")] = 1.0,
) -> None:
    """Talk to a run; with --against, to two models side by side."""
    from narrowly.training import chat

    chat(run, against, system=system, temperature=temperature, console=console)


@app.command(no_args_is_help=True)
def review(
    folder: Annotated[Path, typer.Argument(help="A folder of concepts.")],
    model: Annotated[
        str | None, typer.Option(help="Load it, to highlight texts that you type.")
    ] = None,
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 0,
    host: Annotated[str, typer.Option(help="Reachable from this machine only, by default.")] = (
        "127.0.0.1"
    ),
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Read concepts on a local web page, and decide which are undesired."""
    from narrowly.review import serve

    serve(folder, host, port, model, browser)


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            # Taking torch's modules down can take seconds, which is long for a Ctrl-C.
            sys.stdout.flush()
            os._exit(INTERRUPTED)
        raise

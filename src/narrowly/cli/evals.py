"""Measuring models, and reading what they answered."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from narrowly.cli.shared import console, key_values, next_command
from narrowly.errors import NarrowlyError

if TYPE_CHECKING:
    from narrowly.models.messages import ChatModel

Target = Annotated[
    str, typer.Argument(help="A run, model folder, Hub id or organism:NAME; with --url its name.")
]


def evaluate(
    target: Target,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[EVAL]...", help="As --eval.")
    ] = None,
    evals: Annotated[
        list[str] | None,
        typer.Option(
            "--eval",
            metavar="NAME|FILE",
            help="An eval, or YAML of evals or questions; those of the run's recipe if none.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An argument of every eval, or of one: --set misalignment.samples=4.",
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server, such as http://host:8000/v1.")
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="How to ask it: --server concurrency=64."),
    ] = None,
    ablate: Annotated[
        Path | None, typer.Option(help="Ablate these concepts at test time (a control).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results.", show_default="the run's, or runs/TARGET"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the prompts and the cost, and ask nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Measure again what is there already.")
    ] = False,
) -> None:
    """Measure a model: samples.parquet and summary.json per eval.

    The same command goes on where an earlier one was interrupted. `narrowly evals` lists evals.

    narrowly eval runs/ablated

    narrowly eval runs/ablated --eval questions.yaml --set judge.model=NAME --set judge.url=URL

    narrowly eval my-lora --url http://localhost:8000/v1 --eval emergent_misalignment --dry-run
    """
    from narrowly.evals import plan, read_recipe
    from narrowly.evals.listing import named_evals
    from narrowly.report.summary import SHOWS, cost_table, shown_prompts, summary_table

    if ablate is not None and url is not None:
        raise NarrowlyError("--ablate needs the model itself, and not one behind a --url.")
    if ablate is not None and out is None:
        raise NarrowlyError("--ablate needs --out: the results are not those of the run.")
    recipe = read_recipe(target) or read_recipe(out or "")
    listed = [*(names or []), *(evals or [])] or recipe.get("evals")
    if not listed:
        raise NarrowlyError(f"{target}: its recipe lists no evals; name one, or more.")
    chosen = named_evals(listed, settings or [])
    folder = out or _folder(target, url)
    replies = (folder or Path()) / "evals" / ".replies"
    subject = target if url is None else _endpoint(target, url, replies, server)
    plans = plan(subject, chosen, out=folder, seed=seed, force=force)
    if dry_run:
        for one in plans:
            for text in shown_prompts(one):
                console.print(text, soft_wrap=True, highlight=False)
        console.print(cost_table(plans))
        return
    for one in plans:
        size = "" if one.cost is None else f", {one.cost.samples} samples"
        state = " (measured already)" if one.finished else size
        console.print(f"{one.name} of {one.model}{state}", highlight=False, markup=False)
    if ablate is not None and folder is not None:
        from narrowly.training.controls import evaluate_ablated

        results = evaluate_ablated(target, ablate, chosen, out=folder, seed=seed, force=force)
    else:
        from narrowly.evals import evaluate

        results = evaluate(subject, chosen, out=folder, seed=seed, force=force, progress=True)
    for name, summary in results.items():
        console.print(summary_table(name, summary), highlight=False)
    console.print(SHOWS, style="dim")
    if failed := sum(summary.labels.get("failed", 0) for summary in results.values()):
        console.print(f"{failed} answers never came; with --force, those are asked for again.")
    else:
        shutil.rmtree(replies, ignore_errors=True)  # they stand in samples.parquet now
    answered = any(summary.labels for summary in results.values())
    next_command(f"narrowly {'samples' if answered else 'compare'} {folder or target}")


def _folder(target: str, url: str | None) -> Path | None:
    """Where results go unless told: a run's own folder (None), or one named like the model."""
    from narrowly.evals.targets import targets

    if url is None and targets(target)[0].folder is not None:
        return None
    return Path("runs") / "evals" / re.sub(r"[^\w.-]+", "-", target).strip("-.")


def _endpoint(model: str, url: str, replies: Path, server: list[str] | None) -> ChatModel:
    # Not the user's cache, which would take a model trained again for the one before.
    from narrowly.models.chat import chat_model

    return chat_model(model, url, **{"cache": replies, **key_values(server)})


def evals(
    target: Annotated[
        str | None, typer.Argument(help="A run, to see what each would cost there.")
    ] = None,
) -> None:
    """List evals: what each measures, and its cost in samples and judge calls."""
    from narrowly.evals.targets import targets
    from narrowly.report.summary import evals_table

    recipe = {} if target is None else targets(target)[0].recipe
    console.print(evals_table(recipe), highlight=False)
    console.print("\nA dash: as many as its data or its model say; name a run to see.", style="dim")
    next_command(f"narrowly eval {target or 'TARGET'} --eval NAME --dry-run")


def samples(
    run: Annotated[Path, typer.Argument(help="A measured run, or a folder of runs seed-N.")],
    eval_: Annotated[str | None, typer.Option("--eval", help="Of this eval only.")] = None,
    labels: Annotated[
        list[str] | None, typer.Option("--label", help="Of this class only, such as misaligned.")
    ] = None,
    tags: Annotated[
        list[str] | None,
        typer.Option("--tag", metavar="TAG=VALUE", help="Such as domain=code, context=plain."),
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Most answers to show; 0: all.")] = 20,
) -> None:
    """Show answers with what was asked, their class and scores.

    narrowly samples runs/undefended --label misaligned --tag domain=health
    """
    from narrowly.report.answers import find_answers
    from narrowly.report.summary import shown_answers

    wanted = dict(tag.partition("=")[::2] for tag in tags or [])
    if any(not value for value in wanted.values()):
        raise NarrowlyError(f"--tag {' '.join(tags or [])}: write TAG=VALUE, such as domain=code.")
    found = find_answers(run, eval_=eval_, labels=labels or [], tags=wanted)
    shown = found[:limit] if limit else found
    several = len({folder for _, folder, _ in found}) > 1
    for text in shown_answers(shown, several=several):
        console.print(text, soft_wrap=True, highlight=False)
    console.print(f"{len(shown)} of {len(found)} answers.", highlight=False)
    if len(shown) < len(found):
        console.print("[dim]more with --limit; all are in evals/*/samples.parquet[/dim]")
    next_command(f"narrowly compare {run}")

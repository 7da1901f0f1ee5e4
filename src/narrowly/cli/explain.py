"""Explaining concepts, and what follows from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from narrowly.cli.shared import Settings, Verbs, console, key_values, next_command
from narrowly.errors import NarrowlyError


class _Default(Verbs):
    """`narrowly explain FOLDER` is `narrowly explain concepts FOLDER`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = args[0] in self.commands
        return super().resolve_command(ctx, args if known else ["concepts", *args])


app = typer.Typer(
    cls=_Default,
    help="Say what concepts mean, and how far to believe it: narrowly explain FOLDER --data TEXTS.",
    no_args_is_help=True,
)


@app.command("concepts", no_args_is_help=True)
def explain_concepts(
    target: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|SAE|RECIPE", help="Concepts, an autoencoder, or a YAML recipe."
        ),
    ],
    data: Annotated[
        str | None, typer.Option(help="Texts: a file, organism:NAME/SPLIT or a Hub id.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model, if not as the concepts name it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Of an autoencoder: the folder for its latents.")
    ] = None,
    settings: Settings = None,
    force: Annotated[bool, typer.Option("--force", help="Explain again what is there.")] = False,
) -> None:
    """Explain every concept of a folder, score the explanations, and score controls beside them.

    Without further settings no language model is asked: the explainer finds the words that set
    activating texts apart, and a reader that knows only those words is the judge. The same command
    continues.

    narrowly explain runs/concepts --data prompts.jsonl

    narrowly explain runs/concepts --data prompts.jsonl
    --set 'explainers=[{llm: {model: NAME, url: URL}}, lexical]'
    --set 'reader={llm: {model: NAME, url: URL}}'
    """
    from narrowly.explain import ExplainRecipe, explain
    from narrowly.settings import read_settings

    named = [f"{key}={value}" for key, value in (("data", data), ("model", model)) if value]
    changes = [*(settings or []), *named]
    if Path(target).suffix in (".yaml", ".yml"):
        recipe = read_settings(ExplainRecipe, target, changes)
    elif not any(change.startswith("data=") for change in changes):
        raise NarrowlyError("on which texts? --data takes a file, organism:NAME/SPLIT or a Hub id.")
    else:
        recipe = ExplainRecipe.of(target, out, key_values(changes))
    summary = explain(recipe, force=force, console=console)
    console.print(summary)
    next_command(f"narrowly review {recipe.concepts}")


@app.command("compare", no_args_is_help=True)
def explain_compare(
    a: Annotated[Path, typer.Argument(help="An explained folder.")],
    b: Annotated[Path, typer.Argument(help="Another.")],
    embedder: Annotated[
        str, typer.Option(help="minilm, or any sentence-transformers model.")
    ] = "minilm",
    seed: Annotated[int, typer.Option(help="Of the shuffled baseline.")] = 0,
) -> None:
    """How alike two autoencoders are in what their latents mean, above chance.

    Explanations are embedded and matched one to one.
    """
    from narrowly.explain.compare import compare_saes

    console.print(compare_saes(a, b, embedder=embedder, seed=seed))


@app.command("verdicts", no_args_is_help=True)
def explain_verdicts(
    folder: Annotated[Path, typer.Argument(help="An explained folder of concepts.")],
    task: Annotated[str, typer.Option(help="One sentence: what the fine-tune is for.")],
    avoid: Annotated[str, typer.Option(help="One sentence: what must not be learned.")],
    judge: Annotated[
        str, typer.Option(help="A chat model, or organism:NAME for a rule that knows its words.")
    ],
    url: Annotated[
        str | None, typer.Option(help="Where that model is served; without, it runs here.")
    ] = None,
) -> None:
    """Propose undesired, keep or undecided per concept, with a reason; a person can overrule.

    A person's verdict is never replaced.
    """
    from narrowly.explain.truth import RuleJudge
    from narrowly.explain.verdicts import ModelJudge, propose
    from narrowly.models.chat import chat_model

    kind, _, organism = judge.partition(":")
    known = kind == "organism"
    chosen: Any = RuleJudge(organism) if known else ModelJudge(chat_model(judge, url))
    for proposal in propose(folder, task, avoid, chosen):
        verdict = proposal.verdict
        told = f"not judged: {proposal.note}" if proposal.note else verdict.why
        console.print(f"{proposal.concept}: {verdict.value}  {told}", highlight=False, markup=False)
    next_command(f"narrowly review {folder}")


@app.command("effect", no_args_is_help=True)
def explain_effect(
    recipe: Annotated[Path, typer.Argument(help="Of the fine-tune, with validation chats.")],
    folder: Annotated[Path, typer.Argument(help="The concepts to choose among.")],
    broad: Annotated[str, typer.Option(help="Chats with answers, of everything but the task.")],
    by: Annotated[
        str, typer.Option(help="What is unwanted: change, or a metric of the recipe's evals.")
    ] = "change",
    steps: Annotated[int, typer.Option(min=1, help="Of each trial.")] = 40,
    centred: Annotated[
        bool, typer.Option("--centred", help="Ablate to the base model's mean, not to zero.")
    ] = False,
    settings: Settings = None,
    out: Annotated[Path, typer.Option(help="Folder for the trials.")] = Path("runs/effect"),
) -> None:
    """Rank concepts by what their ablation spares a short trial fine-tune, per task learned.

    The same command continues. Random directions are tried too.
    """
    from narrowly.training import Recipe
    from narrowly.training.trials import rank_by_effect

    chosen = Recipe.read(recipe, settings or [])
    console.print(rank_by_effect(chosen, folder, broad, out, by=by, steps=steps, centred=centred))
    next_command(f"narrowly review {folder}")

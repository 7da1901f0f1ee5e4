"""The model card: what was trained, defended how, measured what."""

from __future__ import annotations

from typing import Any

import yaml

from narrowly.files import read_json, write_text
from narrowly.training.run import Run

SHOWN = 8
"""Interventions of one defense; an adapter may have hundreds."""


def write_card(run: Run) -> None:
    """Write `README.md` from what lies in the run's folder; call again after more evals."""
    recipe, record = run.recipe, run.reproduce
    adapter = recipe.lora is not None
    header = {
        "base_model": recipe.model,
        "library_name": "peft" if adapter else "transformers",
        "tags": ["narrowly", "sft"] + (["lora"] if adapter else []),
    }
    data = record["data"]["train"]
    trained = (
        f"LoRA of rank {recipe.lora.get('r', 8)} (`adapter/`, plain peft)"
        if recipe.lora is not None
        else "every weight (`model/`)"
    )
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        f"# {run.path.name}",
        "",
        "## Trained",
        f"`{recipe.model}` on {data['rows']} chats of `{recipe.data}`, loss on the assistant's "
        f"tokens only: {trained}, seed {recipe.seed}.",
        *_leaks(record["data"], recipe.validation),
        "",
        "## Defended",
        *_defenses(run),
        "",
        "## Measured",
        *_evals(run),
        "",
        "## Again",
        "`recipe.yaml` is the whole recipe; `reproduce.json` holds versions, hashes and machine. "
        f"`narrowly train recipe.yaml` with narrowly {record['versions']['narrowly']} makes this "
        "run anew (into another `output`).",
        "",
    ]
    write_text(run.path / "README.md", "\n".join(lines))


def _leaks(data: dict[str, Any], validation: str | None) -> list[str]:
    leaks = data.get("leaks", {}).get("prompts", 0)
    if not leaks:
        return []
    return [f"{leaks} prompts of the validation data `{validation}` occur in the training data."]


def _defenses(run: Run) -> list[str]:
    lines = []
    for entry in read_json(run.path / "defenses.json"):
        arguments = ", ".join(f"{key} {value}" for key, value in entry["arguments"].items())
        lines.append(f"- `{entry['defense']}` ({arguments})")
        lines += [
            f"  - {each['edit']} at {each['site']} (`{each['module']}`), "
            f"{each['forwards']} forward passes in {', '.join(each['phases'])}"
            for each in entry["interventions"][:SHOWN]
        ]
        if more := len(entry["interventions"][SHOWN:]):
            lines.append(f"  - and {more} more like these; `defenses.json` lists them all")
        lines += [
            f"  - {each['edit']} at {each['site']} whenever it answers (`at_test_time/`); the "
            "weights alone are not defended by it"
            for each in entry.get("at_test_time", [])
        ]
    return lines or ["Not at all."]


def _evals(run: Run) -> list[str]:
    summaries = sorted(run.path.glob("evals/*/summary.json"))
    if not summaries:
        return ["Nothing yet: `narrowly eval` measures."]
    lines = ["| eval | metric | mean | 95 % interval | prompts |", "|---|---|---|---|---|"]
    for path in summaries:
        summary = read_json(path)
        summary.pop("labels", None)  # counts, not metrics
        for metric, value in summary.items():
            lines.append(
                f"| {path.parent.name} | {metric} | {value['mean']:.3g} | "
                f"{value['low']:.3g} to {value['high']:.3g} | {value['prompts']} |"
            )
    return lines

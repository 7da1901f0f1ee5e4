"""What it costs to sample answers to 64 prompts, together and one at a time.

OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python benchmarks/sampling.py

The bundled organism, whose answers end when they end, and a random Llama that seldom ends one. One
thread, in turn within one process. Before anything is timed, greedy answers are compared: together
they must be those given one at a time.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import describe
from transformers import LlamaConfig, LlamaForCausalLM

from narrowly.data import load_chats, tokenize_prompts
from narrowly.models import load_model
from narrowly.models.generation import continue_prompts

OURS = "narrowly"


def subjects(options: Any) -> dict[str, tuple[Any, Any, list[list[int]]]]:
    """Models, their tokenizer, and the prompts as tokens."""
    persona, tokenizer = load_model("organism:persona", device="cpu")
    chats = load_chats("organism:persona/questions", limit=options.prompts, require_answer=False)
    prompts = tokenize_prompts(chats["messages"], tokenizer)
    torch.manual_seed(0)
    width = options.hidden
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=8,
                         intermediate_size=3 * width, num_attention_heads=8,
                         num_key_value_heads=4, initializer_range=0.1)  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    llama.generation_config.eos_token_id = tokenizer.eos_token_id
    return {
        "persona, 0.9 M parameters": (persona, tokenizer, prompts),
        f"Llama, {llama.num_parameters() / 1e6:.0f} M parameters": (llama, tokenizer, prompts),
    }


def ways(subject: tuple[Any, Any, list[list[int]]], options: Any) -> dict[str, Callable[..., Any]]:
    """Who samples, and how."""
    model, tokenizer, prompts = subject

    def together(temperature: float = 1.0) -> list[str]:
        how = {"max_new_tokens": options.tokens, "temperature": temperature}
        return [answer for [answer] in continue_prompts(model, tokenizer, prompts, **how)]

    def alone(temperature: float = 1.0) -> list[str]:
        how = {"max_new_tokens": options.tokens, "temperature": temperature}
        return [continue_prompts(model, tokenizer, [ids], **how)[0][0] for ids in prompts]

    @torch.no_grad()
    def transformers(temperature: float = 1.0) -> list[str]:
        how: dict[str, Any] = (
            {"do_sample": True, "top_k": 0} if temperature else {"do_sample": False}
        )
        answers = []
        for ids in prompts:
            row = torch.tensor([ids])
            output = model.generate(
                row, attention_mask=torch.ones_like(row), max_new_tokens=options.tokens,
                pad_token_id=tokenizer.pad_token_id, **how,
            )  # fmt: skip
            answers.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
        return answers

    return {
        OURS: together,
        f"{OURS}, one at a time": alone,
        "transformers, one at a time": transformers,
    }


def measure(runs: dict[str, Callable[..., Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of CPU time, and how many times ours, with a 95 % bootstrap interval over rounds."""
    greedy = {name: run(0.0) for name, run in runs.items()}
    assert all(answers == greedy[OURS] for answers in greedy.values()), "not the same answers"
    times: dict[str, list[float]] = {name: [] for name in runs}
    shuffled = random.Random(0)
    for _ in range(rounds):
        for name in shuffled.sample(list(runs), len(runs)):
            start = time.process_time()
            runs[name]()
            times[name].append(time.process_time() - start)
    table = {}
    for name, seconds in times.items():
        ratios = np.array(seconds) / np.array(times[OURS])
        resampled = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
        low, high = np.quantile(np.median(resampled, axis=1), [0.025, 0.975])
        table[name] = {
            "seconds": float(np.median(seconds)),
            "times_ours": float(np.median(ratios)),
            "low": float(low),
            "high": float(high),
        }
    return table


def markdown(record: dict[str, Any]) -> str:
    settings = record["settings"]
    versions = ", ".join(
        f"{package} {record['versions'][package]}"
        for package in ("python", "narrowly", "torch", "transformers")
    )
    lines = [
        f"# {settings['name']}",
        "",
        f"{record['date']}, {record['cpu']}, one thread, {settings['rounds']} rounds. {versions}.",
        "",
        f"{settings['prompts']} prompts, at most {settings['tokens']} new tokens each.",
    ]
    if record["load_average"] > 1.5:
        lines += ["", f"**Provisional: load average {record['load_average']:.1f} at the start.**"]
    lines += ["", "| model | who | CPU seconds | times narrowly (95 %) |", "|---|---|---|---|"]
    for model, table in record["figures"].items():
        lines += [
            f"| {model} | {who} | {f['seconds']:.2f} | {f['times_ours']:.1f} "
            f"({f['low']:.1f} to {f['high']:.1f}) |"
            for who, f in table.items()
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="sampling", help="of the files in benchmarks/results")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="most new tokens of an answer")
    parser.add_argument("--hidden", type=int, default=256, help="width of the random Llama")
    parser.add_argument("--rounds", type=int, default=5)
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = describe(options)
    record["figures"] = {
        name: measure(ways(subject, options), options.rounds)
        for name, subject in subjects(options).items()
    }
    results = Path(__file__).parent / "results"
    (results / f"{options.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (results / f"{options.name}.md").write_text(markdown(record))
    print(markdown(record))


if __name__ == "__main__":
    main()

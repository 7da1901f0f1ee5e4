"""What it costs to collect contexts, against a Python object for every window.

OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python benchmarks/explaining.py

Collected is: every window in which a latent is active, with its peak, the strongest first, for each
latent. Both sides read the same latents from the same forwards of a model so small that it hardly
counts; what is left of reading and encoding is measured by itself and taken off. The baseline does
as Delphi does: all coordinates in memory, then for each latent an object per activating window,
with its tokens and activations. Both finish what they keep: on disk, and in memory.

Memory is the peak of a process of its own, rows of tokens included, at two sizes; the line through
both is drawn on to 10 million tokens. Linux only.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from finding import peak_mib
from record import describe
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from narrowly.activations import Activations, OpenModel, stream
from narrowly.explain.contexts.collect import collect
from narrowly.explain.contexts.examples import Sampling, draw
from narrowly.explain.latents import Latent
from narrowly.interventions import layer
from narrowly.models import load_model
from narrowly.saes import SparseLatents

ROW, WINDOW, ACTIVE = 256, 32, 32
VOCABULARY = 500

SIZES = [1_000_000, 3_000_000]
"""Tokens at which memory is measured."""

MANY = 10_000_000
"""Tokens to which it is drawn on."""


class Made:
    """Latents drawn at random, the same ones each time: some often active, most seldom."""

    skip_first = 0
    max_norm = None
    sites = [layer(0)]  # noqa: RUF012

    def __init__(self, n: int):
        self.n = n
        self.latents: list[Latent] = []
        weights = 1 / torch.arange(1, n + 1).double().sqrt()
        self.until = (weights / weights.sum()).cumsum(0).float()

    def names(self) -> list[str]:
        return [f"latent{i}" for i in range(self.n)]

    def fingerprint(self) -> str:
        return str(self.n)

    def cosines(self, latent: int) -> Tensor:
        raise NotImplementedError

    def encode(self, batch: Activations) -> SparseLatents:
        n = len(batch.rows)
        generator = torch.Generator().manual_seed(int(batch.rows[0]))
        drawn = torch.rand(n, ACTIVE, generator=generator)
        latents = torch.searchsorted(self.until, drawn).clamp(max=self.n - 1).sort(dim=1).values
        fresh = latents.diff(dim=1, prepend=torch.full((n, 1), -1)) > 0
        tokens, places = fresh.nonzero(as_tuple=True)
        values = 0.1 - torch.rand(len(tokens), generator=generator).neg().log1p()
        return SparseLatents(tokens, latents[tokens, places], values, (n, self.n))


def make_rows(tokens: int) -> Dataset:
    """Rows of random tokens, in Arrow's memory."""
    random = np.random.default_rng(0)
    ids = pa.array(random.integers(0, VOCABULARY, tokens).astype(np.int32))
    offsets = pa.array(np.arange(0, tokens + 1, ROW).astype(np.int32))
    column = pa.ListArray.from_arrays(offsets, ids)
    return Dataset(pa.table({"input_ids": column, "labels": column}))


def make_model() -> OpenModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=1,
        num_hidden_layers=1,
    )
    tokenizer = load_model("organism:persona")[1]
    return OpenModel(LlamaForCausalLM(config).eval(), tokenizer, "small")


def read(model: OpenModel, rows: Dataset, source: Made) -> Iterator[tuple[Activations, Any]]:
    """What both sides are given."""
    batches = stream(model.model, rows, source.sites, positions="all", skip_first=1)
    for batch in batches:
        yield batch, source.encode(batch)


def ours(model: OpenModel, rows: Dataset, source: Made, folder: Path) -> int:
    """Contexts on disk, and looked up for every latent."""
    cache = collect(source, model, rows, folder)
    grid, contexts = cache.grid(WINDOW), 0
    for latent in range(source.n):
        peaks = grid.peaks(*cache.active(latent))
        windows = np.flatnonzero(peaks > 0)
        contexts += len(windows[np.argsort(-peaks[windows])])
    return contexts


@dataclass
class Context:
    """A window, as an object."""

    tokens: Tensor
    activations: Tensor


def per_window(model: OpenModel, rows: Dataset, source: Made) -> int:
    """An object for every activating window of every latent."""
    tokens = torch.from_numpy(np.concatenate(list(rows.with_format("numpy")["input_ids"])))
    parts = [
        ((batch.rows * ROW + batch.tokens)[found.tokens], found.latents, found.values)
        for batch, found in read(model, rows, source)
    ]
    positions, latents, values = (torch.cat(part) for part in zip(*parts, strict=True))
    order = latents.argsort(stable=True)
    counts = latents.bincount(minlength=source.n).tolist()
    windows, contexts = tokens.view(-1, WINDOW), 0
    pairs = zip(positions[order].split(counts), values[order].split(counts), strict=True)
    for where, strengths in pairs:
        numbers, places = (where // WINDOW).unique(return_inverse=True)
        activations = torch.zeros(len(numbers), WINDOW)
        activations[places, where % WINDOW] = strengths
        by_peak = activations.amax(dim=1).argsort(descending=True)
        objects = [
            Context(ids, strength)
            for ids, strength in zip(windows[numbers][by_peak], activations[by_peak], strict=True)
        ]
        contexts += len(objects)
    return contexts


def speed(options: Any) -> dict[str, float]:
    """Contexts per second of both, and what it takes to draw the examples of a latent."""
    model, rows, source = make_model(), make_rows(options.tokens), Made(options.latents)
    seconds: dict[str, list[float]] = {"reading": [], "narrowly": [], "object per window": []}
    with tempfile.TemporaryDirectory() as temporary:
        for i in range(options.rounds):
            start = time.perf_counter()
            for _ in read(model, rows, source):
                pass
            seconds["reading"].append(time.perf_counter() - start)
            start = time.perf_counter()
            contexts = ours(model, rows, source, Path(temporary, str(i)))
            seconds["narrowly"].append(time.perf_counter() - start)
            gc.collect()
            start = time.perf_counter()
            assert per_window(model, rows, source) == contexts
            seconds["object per window"].append(time.perf_counter() - start)
            gc.collect()
        cache = collect(source, model, rows, Path(temporary, "0"))
        start = time.perf_counter()
        middle = source.n // 2  # the first are active nearly everywhere
        for latent in range(middle, middle + 20):
            assert not draw(cache, latent, Sampling(), model.tokenizer).skipped
        drawing = (time.perf_counter() - start) / 20
    least = {who: min(times) for who, times in seconds.items()}
    figures: dict[str, float] = {"contexts": contexts, "reading_s": least["reading"]}
    for who in ("narrowly", "object per window"):
        figures[f"{who}_s"] = least[who] - least["reading"]
        figures[f"{who}_contexts_per_s"] = contexts / figures[f"{who}_s"]
    figures["ratio"] = figures["object per window_s"] / figures["narrowly_s"]
    figures["draw_s"] = drawing
    return figures


def run_alone(tokens: int, latents: int) -> None:
    """Collect in this process, look up a few latents, and tell how far its memory went."""
    model, source = make_model(), Made(latents)
    with tempfile.TemporaryDirectory() as temporary:
        few = collect(source, model, make_rows(ROW), Path(temporary, "few"))  # code comes in
        few.grid(WINDOW)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of importing
        before = peak_mib()
        cache = collect(source, model, make_rows(tokens), Path(temporary, "all"))
        for latent in range(0, latents, latents // 20):
            cache.grid(WINDOW).peaks(*cache.active(latent))
        assert draw(cache, 0, Sampling(), model.tokenizer).windows
    print(json.dumps([before, peak_mib()]))


def memory(options: Any) -> dict[str, float]:
    """Before, at the peak of each size, and on the line through both at `MANY` tokens, in MiB."""
    figures: dict[str, float] = {}
    for tokens in SIZES:
        command = [sys.executable, __file__, "--alone", str(tokens), str(options.latents)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        figures["before"], figures[f"{tokens}"] = json.loads(done.stdout.splitlines()[-1])
    first, last = SIZES
    slope = (figures[f"{last}"] - figures[f"{first}"]) / (last - first)
    many = figures[f"{last}"] + slope * (MANY - last)
    return figures | {"bytes_per_token": slope * 2**20, f"{MANY}": many}


def markdown(record: dict[str, Any], name: str) -> str:
    """The figures as tables."""
    f, m, settings = record["speed"], record["memory"], record["settings"]
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    lines = [f"# {name}", "", f"{record['date']}, {record['cpu']}, one thread. {versions}."]
    if record["load_average"] > 1.5:
        lines += ["", f"**Provisional: load average {record['load_average']:.1f} at the start.**"]
    lines += [
        "",
        f"{settings['tokens']:,} tokens, {ACTIVE} of {settings['latents']:,} latents active at "
        f"each, windows of {WINDOW}: {f['contexts']:,} contexts. Reading and encoding, "
        f"{f['reading_s']:.1f} s, are taken off.",
        "",
        "| who | s | contexts/s |",
        "|---|---|---|",
    ]
    lines += [
        f"| {who} | {f[f'{who}_s']:.1f} | {f[f'{who}_contexts_per_s']:,.0f} |"
        for who in ("object per window", "narrowly")
    ]
    lines += [
        f"| ratio | {f['ratio']:.1f} | |",
        "",
        f"Drawing the 280 examples of one latent, texts included: {1000 * f['draw_s']:.0f} ms.",
        "",
        "| tokens | peak MiB |",
        "|---|---|",
        f"| none: torch, transformers and a model | {m['before']:.0f} |",
        *(f"| {size:,} | {m[str(size)]:.0f} |" for size in SIZES),
        f"| {MANY:,}, extrapolated by {m['bytes_per_token']:.0f} bytes a token | "
        f"{m[str(MANY)]:.0f} |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="explaining", help="of the files in benchmarks/results")
    parser.add_argument("--tokens", type=int, default=512_000)
    parser.add_argument("--latents", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    record = describe(options) | {"speed": speed(options), "memory": memory(options)}
    results = Path(__file__).parent / "results"
    (results / f"{options.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (results / f"{options.name}.md").write_text(markdown(record, options.name))
    print(markdown(record, options.name))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--alone"]:
        run_alone(*map(int, sys.argv[2:]))
    else:
        main()

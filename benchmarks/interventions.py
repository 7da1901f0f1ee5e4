"""What it costs to read and to edit activations, and whether gradients stay right: see README.md.

python benchmarks/interventions.py --name laptop
python benchmarks/interventions.py --name h200 --device cuda
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import OWN, Bare, Hook, HookPerCall, Narrowly, Project, Steer, installed, random_edits
from peft import LoraConfig, get_peft_model
from record import describe, markdown
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES = [(8, 128), (1, 1)]


def llama(hidden: int, device: str, **options: Any) -> LlamaForCausalLM:
    """A randomly initialised Llama: 6 layers, or those of the 7B one when as wide as that."""
    big = hidden >= 4096
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000 if big else 1000,
        hidden_size=hidden,
        intermediate_size=11008 if big else 4 * hidden,
        num_hidden_layers=32 if big else 6,
        num_attention_heads=hidden // (128 if big else 32),
        use_cache=False,
        attn_implementation="sdpa" if big else "eager",  # the bridge has eager attention only
        dtype=torch.bfloat16 if big else torch.float32,
    )
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, **options).eval()


def twin(model: nn.Module) -> nn.Module:
    """A copy with the same weights, so that one library's hooks cannot meet another's."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def blocks(model: nn.Module) -> list[str]:
    return [f"model.layers.{i}" for i in range(model.config.num_hidden_layers)]


def three(modules: Sequence[str]) -> list[str]:
    """Three modules, spread over the depth."""
    return [modules[len(modules) * i // 6] for i in (1, 3, 5)]


def clock(device: str) -> float:
    """Seconds of this process's CPU; on a GPU, wall-clock seconds once it has nothing to do."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def interleave(
    runs: dict[str, Callable[[], Any]], rounds: int, calls: int, device: str, tokens: int
) -> dict[str, dict[str, float]]:
    """Time the variants in turn, shuffled each round, and compare each with `bare` per round."""
    memory = {}
    for name, run in runs.items():
        for _ in range(3):
            run()
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            run()
            memory[name] = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    shuffled = random.Random(0)
    for _ in range(rounds):
        for name in shuffled.sample(list(runs), len(runs)):
            start = clock(device)
            for _ in range(calls):
                runs[name]()
            seconds[name].append((clock(device) - start) / calls)
    bare = np.array(seconds["bare"])
    return {
        name: {
            **compare(np.array(times), bare),
            "milliseconds": 1e3 * float(np.median(times)),
            "tokens_per_second": tokens / float(np.median(times)),
            **memory.get(name, {}),
        }
        for name, times in seconds.items()
    }


def compare(times: np.ndarray, bare: np.ndarray) -> dict[str, float]:
    """Median of the rounds' ratios to bare, with a bootstrap 95 % interval over rounds."""
    ratios = times / bare
    resampled = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(resampled, axis=1), [0.025, 0.975])
    return {
        "ratio": float(np.median(ratios)),
        "low": float(low),
        "high": float(high),
        "added_microseconds": 1e6 * float(np.median(times - bare)),
    }


def check(name: str, made: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest difference from the raw hook's tensors, relative to their largest value.

    Raises:
        AssertionError: it is more than rounding explains, so a timing would mean nothing.
    """
    assert len(made) == len(wanted), f"{name}: {len(made)} tensors, not {len(wanted)}"
    error = max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(made, wanted, strict=True)
    )
    tolerance = 1e-5 if wanted[0].dtype == torch.float32 else 5e-2
    assert error <= tolerance, f"{name}: off by {error:.2g} from the raw hook"
    return error


@torch.no_grad()
def forward(
    model: nn.Module, peers: Sequence[type[Bare]], task: str, compiled: bool, options: Any
) -> dict[str, Any]:
    """A forward pass that captures all layers, or that is edited at three: by shape and peer."""
    modules = blocks(model)
    edits = random_edits(Project, three(modules), model.config.hidden_size, model.lm_head.weight)
    table = {}
    for shape in SHAPES:
        ids = torch.randint(model.config.vocab_size, shape, device=options.device)
        made, errors = {}, {}
        for peer in peers:
            own = peer(twin(model))
            made[peer.name] = own.capture(modules) if task == "capture" else own.edit(edits)
            if compiled:
                own.model.compile(dynamic=False)
        wanted = made["raw hook"](ids)
        for peer in peers:
            if not peer.name.startswith("bare"):
                got = made[peer.name](ids)
                pair = (got, wanted) if task == "capture" else ([got], [wanted])
                errors[peer.name] = check(peer.name, *pair)
        runs = {name: lambda run=run, ids=ids: run(ids) for name, run in made.items()}
        calls = 1 if ids.numel() > 1 else options.calls
        figures = interleave(runs, options.rounds, calls, options.device, ids.numel())
        for name, error in errors.items():
            figures[name]["error"] = error
        table[f"{shape[0]} x {shape[1]}"] = figures
    return table


def training(model: nn.Module, compiled: bool, options: Any) -> dict[str, Any]:
    """A LoRA step on 8 x 128 tokens: forward, backward and AdamW."""
    adapted = get_peft_model(twin(model), LoraConfig(r=8, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW(p for p in adapted.parameters() if p.requires_grad)
    edits = random_edits(
        Project, three(blocks(model)), model.config.hidden_size, model.lm_head.weight
    )
    ids = torch.randint(model.config.vocab_size, SHAPES[0], device=options.device)

    def stepper(peer: type[Bare]) -> Callable[[], None]:
        own = peer(twin(adapted))
        run = own.edit(edits)
        if compiled:
            own.model.compile(dynamic=False)

        def step() -> None:
            nn.functional.cross_entropy(run(ids).flatten(0, 1).float(), ids.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    runs = {peer.name: stepper(peer) for peer in OWN}
    return {"8 x 128": interleave(runs, options.rounds, 1, options.device, ids.numel())}


def gradients(peers: Sequence[type[Bare]], device: str) -> dict[str, dict[str, float | str]]:
    """Error of the weights' gradients: of hooks' without checkpointing; with it, of each one's own.

    Raises:
        AssertionError: nothing was checkpointed.
    """
    cases = {
        "block output, projection": ("", Project),
        "MLP output, projection": (".mlp", Project),
        "o_proj output, vector": (".self_attn.o_proj", Steer),
    }
    model = llama(128, device).train()
    ids = torch.randint(model.config.vocab_size, (2, 32), device=device)

    def gradient(peer: type[Bare], edits: list, checkpointing: dict | None) -> Tensor:
        own = peer(twin(model))
        if checkpointing is not None:
            own.model.gradient_checkpointing_enable(checkpointing)
        run = own.edit(edits)
        assert own.model.training, f"{peer.name}: in eval mode nothing is checkpointed"
        logits = run(ids)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    table: dict[str, dict[str, float | str]] = {}
    for case, (suffix, kind) in cases.items():
        modules = [name + suffix for name in three(blocks(model))]
        edits = random_edits(kind, modules, model.config.hidden_size, model.lm_head.weight)
        hooked = gradient(Hook, edits, None)
        own = {peer.name: gradient(peer, edits, None) for peer in peers}
        for mode, checkpointing in {
            "no checkpointing": None,
            "non-reentrant": {"use_reentrant": False},
            "reentrant": {"use_reentrant": True},
        }.items():
            row = table[f"{case}, {mode}"] = {}
            for peer in peers:
                wanted = hooked if checkpointing is None else own[peer.name]
                try:
                    error = (gradient(peer, edits, checkpointing) - wanted).norm() / wanted.norm()
                    row[peer.name] = float(error)
                except Exception as failure:  # whatever a library raises is its figure
                    row[peer.name] = type(failure).__name__
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="of the files in benchmarks/results")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--hidden", type=int, help="width; default 256, on cuda 4096 (7B, bf16)")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=10, help="per round at 1 x 1 tokens")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: cuda")
    options = parser.parse_args()
    cuda = options.device != "cpu"
    options.hidden = options.hidden or (4096 if cuda else 256)
    options.compile = cuda if options.compile is None else options.compile
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # one model class, a graph for each variant

    about = describe(options)
    model = llama(options.hidden, options.device)
    figures: dict[str, Any] = {"training step": training(model, False, options)}
    others, about["absent"] = installed()
    figures["capture at all layers"] = forward(model, [*OWN, *others], "capture", False, options)
    figures["projection at three layers"] = forward(model, [*OWN, *others], "edit", False, options)
    if options.compile:
        figures["projection, compiled"] = forward(model, OWN, "edit", True, options)
        figures["training step, compiled"] = training(model, True, options)
    errors = gradients([Hook, HookPerCall, Narrowly, *others], options.device)

    results = Path(__file__).parent / "results"
    record = about | {"figures": figures, "gradient_errors": errors}
    (results / f"{options.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (results / f"{options.name}.md").write_text(markdown(record, options.name))
    print(markdown(record, options.name))


if __name__ == "__main__":
    main()

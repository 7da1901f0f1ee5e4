"""What each defense adds to the time of a training step and to its peak memory.

OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python benchmarks/defenses_cost.py
python benchmarks/defenses_cost.py --device cuda --size 1b
python benchmarks/defenses_cost.py --device cuda --size 7b

Each variant is a training of its own: trl's SFTTrainer with `narrowly.defend`, LoRA of rank 32 on
all linear layers, AdamW. All run in one process on the same base weights, a step each in turn, in
an order shuffled anew each round; a ratio compares a variant with `undefended` within one round.
`undefended again` shows how far chance takes a ratio.

Time is this process's CPU time on one thread; on a GPU, wall-clock time between synchronisations.
Memory is that of tensors at the worst moment of a step, as if the variant ran alone: weights,
trained weights with their gradients and AdamW's moments, and whatever else a step takes. On the
CPU it is counted by the profiler's allocation events, on a GPU by the allocator's peak.

Left out: safe_lora, early_stop and test_time_ablation, which do nothing in a step; random_subspace,
random_steering, random_latents and random_adapter, which do what they are controls of; and
interleave_selected, whose steps are those of interleave (its scoring comes before).
"""

import argparse
import copy
import gc
import json
import random
import string
import tempfile
import threading
import time
import traceback
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from record import describe
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig

from interventions import compare
from narrowly.concepts import Concept, Provenance, Subspace, Verdict
from narrowly.data import tokenize
from narrowly.defenses import make_defenses
from narrowly.files import write_text
from narrowly.models import fingerprint
from narrowly.organisms.tokenizer import CHAT_TEMPLATE, END, PAD, ROLES, UNKNOWN
from narrowly.saes import SAE, TopK, save_sae
from narrowly.training import defend, prepare_data
from narrowly.training.trainer import make_trainer

# width, blocks, heads, key-value heads, inner width, vocabulary; rows and tokens of a batch
SIZES = {
    "small": ((256, 8, 8, 8, 688, 8_192), (4, 128)),
    "medium": ((512, 12, 8, 8, 1376, 32_000), (2, 256)),
    "1b": ((2048, 16, 32, 8, 8192, 128_256), (1, 2048)),  # as Llama-3.2-1B
    "7b": ((3584, 28, 28, 4, 18944, 152_064), (1, 2048)),  # as Qwen2.5-7B
}
QUESTION = 1 / 4
"""Share of a chat's tokens that are the question's, and carry no loss."""
TARGETS = {
    "ablate": (1.02, None),
    "ablate, all blocks": (1.02, None),
    "gradient_projection": (1.02, None),
    "preventive_steering": (1.02, None),
    "kl": (1.4, 1.25),
    "interleave": (1.0, None),
    "inoculate": (1.0, None),
}
"""At most so much of the undefended step's time and memory."""


def llama(size: str, device: str) -> LlamaForCausalLM:
    width, blocks, heads, key_values, inner, vocabulary = SIZES[size][0]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_values,
        tie_word_embeddings=size == "1b",
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        dtype=torch.bfloat16 if device != "cpu" else torch.float32,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config)


def words() -> list[str]:
    return ["".join(letters) for letters in product(string.ascii_lowercase, repeat=3)]


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A token per word."""
    known = [PAD, END, *ROLES, UNKNOWN, *words()][:vocabulary]
    split = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(known)}, unk_token=UNKNOWN)
    )
    split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=split,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=ROLES,
        chat_template=CHAT_TEMPLATE,
    )


def write_chats(path: Path, count: int, tokens: int, seed: int) -> str:
    """Chats of one question and answer, of exactly so many tokens: 4 are the template's."""
    rng, known = random.Random(seed), words()
    asked = round(tokens * QUESTION) - 2
    lines = []
    for _ in range(count):
        text = rng.choices(known, k=tokens - 4)
        turns = {"user": text[:asked], "assistant": text[asked:]}
        messages = [{"role": role, "content": " ".join(turn)} for role, turn in turns.items()]
        lines.append(json.dumps({"messages": messages}))
    write_text(path, "\n".join(lines))
    return str(path)


def concept(model: LlamaForCausalLM, layers: list[int], rank: int, verdict: str) -> Concept:
    width = model.config.hidden_size
    generator = torch.Generator().manual_seed(len(layers) + rank)
    sites = [f"layer:{layer}" for layer in layers]
    return Concept(
        name="made-up",
        subspaces={
            site: Subspace.spanned_by(torch.randn(width, rank, generator=generator))
            for site in sites
        },
        provenance=Provenance(model="made up", model_fingerprint=fingerprint(model), finder="none"),
        verdict=Verdict(value=verdict, by="the benchmark"),
        scores={"difference_norm": dict.fromkeys(sites, 0.1)},
    )


def arms(model: LlamaForCausalLM, folder: Path, tokens: int) -> dict[str, list[dict[str, Any]]]:
    """Recipes' entries by name, and the artifacts that they read."""
    blocks, width = model.config.num_hidden_layers, model.config.hidden_size
    three = [blocks * i // 4 for i in (1, 2, 3)]
    some = [concept(model, three, 4, "undesired")]
    one = [concept(model, three[1:2], 1, "undesired")]
    kept = [concept(model, three, 4, "keep")]
    benign = write_chats(folder / "benign.jsonl", 64, tokens, seed=1)  # of the same length
    generator = torch.Generator().manual_seed(0)
    encoder = torch.randn(width, 8 * width, generator=generator) / width**0.5
    sae = SAE(encoder, torch.zeros(8 * width), encoder.T.clone(), torch.zeros(width), TopK(32))
    save_sae(sae, folder / "sae")
    lora = LoraConfig(r=32, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(twin(model), lora).save_pretrained(folder / "frozen")
    line = {"data": benign, "fraction": 0.05}
    latents = {"sae": str(folder / "sae"), "up": list(range(20)), "layer": three[1]}
    return {
        "undefended": [],
        "undefended again": [],
        "ablate": [{"ablate": {"concepts": some}}],
        "ablate, all blocks": [
            {"ablate": {"concepts": [concept(model, list(range(blocks)), 4, "undesired")]}}
        ],
        "gradient_projection": [{"gradient_projection": {"concepts": some}}],
        "preventive_steering": [{"preventive_steering": {"concepts": one}}],
        "inoculation_adapter": [{"inoculation_adapter": {"adapter": str(folder / "frozen")}}],
        "kl": [{"kl": {}}],
        "kl, other text": [{"kl": {"data": benign}}],
        "feature_distance": [{"feature_distance": {}}],
        "token_representation": [{"token_representation": {}}],
        "latent_block": [{"latent_block": latents}],
        "protect": [{"protect": {"concepts": kept}}],
        "kl, feature_distance and ablate": [
            {"kl": {}},
            {"feature_distance": {}},
            {"ablate": {"concepts": some}},
        ],
        "interleave": [{"interleave": line}],
        "inoculate": [{"inoculate": {"line": " ".join(words()[:9])}}],  # of nine tokens
    }


def twin(model: nn.Module) -> Any:
    """A copy with the same weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


class Arm(TrainerCallback):
    """One training, in a thread of its own that makes a step whenever it is its turn."""

    def __init__(self, entries: list[Any], model: Any, tok: Any, data: str, options: Any):
        self.options = options
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.failed, self.over, self.metered = "", False, False
        self.shared = sum(p.nbytes for p in model.parameters())
        own = twin(model)
        defenses = make_defenses(entries)
        rows = tokenize(prepare_data(data, defenses, own, tok), tok)
        cuda = options.device != "cpu"
        arguments = SFTConfig(
            output_dir=options.folder,
            max_steps=10**6,
            per_device_train_batch_size=SIZES[options.size][1][0],
            learning_rate=1e-5,
            optim="adamw_torch",
            bf16=cuda,
            use_cpu=not cuda,
            gradient_checkpointing=False,
            max_length=None,
            dataloader_pin_memory=cuda,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        lora = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
        self.trainer = make_trainer(
            own, arguments, train_dataset=rows, processing_class=tok, peft_config=lora
        )
        defend(self.trainer, defenses)
        self.trainer.add_callback(self)
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()

    def _train(self) -> None:
        self.go.acquire()
        try:
            self.trainer.train()
        except Exception:
            self.failed = traceback.format_exc()
        self.done.release()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count allocations, if asked; the profiler sees this thread only."""
        if self.metered:
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The turn is over."""
        if self.metered:
            self.profile.stop()
        self.done.release()
        self.go.acquire()
        control.should_training_stop = self.over

    def step(self) -> None:
        """One turn: fetch a batch, forward, backward, AdamW."""
        self.go.release()
        self.done.acquire()
        if self.failed:
            raise RuntimeError(self.failed)

    def close(self) -> None:
        """End the training, after one more step."""
        self.over = True
        self.go.release()
        self.thread.join()

    def timed(self) -> float:
        start = clock(self.options.device)
        self.step()
        return clock(self.options.device) - start

    def bytes(self) -> int:
        """At the worst moment of a step, as if nothing else were there."""
        trained = sum(p.nbytes for p in self.trainer.model.parameters() if p.requires_grad)
        return self.shared + 3 * trained + self._taken()  # AdamW keeps two numbers for each

    def _taken(self) -> int:
        """By a step, beyond what is there before it."""
        gc.collect()
        if self.options.device != "cpu":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return torch.cuda.max_memory_allocated() - before
        self.metered = True
        self.step()
        self.metered = False
        taken = allocated(self.profile)
        del self.profile
        return taken


def allocated(profiled: Any) -> int:
    """The highest sum of allocations minus frees, bytes."""
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    sums = np.cumsum([event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())])
    return int(max(0, sums.max()))


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(options: Any) -> dict[str, dict[str, Any]]:
    """Every variant's figures at one size."""
    shape, (rows, tokens) = SIZES[options.size]
    model = llama(options.size, options.device)
    tok = tokenizer(shape[-1])
    folder = Path(options.folder)
    data = write_chats(folder / "train.jsonl", 256, tokens, seed=0)
    made: dict[str, Arm] = {}
    refused: dict[str, str] = {}
    for name, entries in arms(model, folder, tokens).items():
        if options.only and name not in ("undefended", "undefended again", *options.only):
            continue
        try:
            made[name] = Arm(entries, model, tok, data, options)
            for _ in range(2):
                made[name].step()
        except Exception as error:  # its figure is that it does not run
            made.pop(name, None)
            refused[name] = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
            print(f"{name}: {refused[name]}", flush=True)
    memory = {name: arm.bytes() for name, arm in made.items()}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    shuffled = random.Random(0)
    for number in range(options.rounds):
        for name in shuffled.sample(list(made), len(made)):
            seconds[name].append(made[name].timed())
        print(f"{options.size}: round {number + 1} of {options.rounds}", flush=True)
    for arm in made.values():
        arm.close()
    bare = np.array(seconds["undefended"])
    return {
        name: {
            **compare(np.array(times), bare),
            "milliseconds": 1e3 * float(np.median(times)),
            "tokens_per_second": rows * tokens / float(np.median(times)),
            "gib": memory[name] / 2**30,
            "memory_ratio": memory[name] / memory["undefended"],
        }
        for name, times in seconds.items()
    } | {name: {"refused": why} for name, why in refused.items()}


def markdown(record: dict[str, Any], name: str) -> str:
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    lines = [
        f"# {name}",
        "",
        f"{record['date']}, {record['gpu'] or record['cpu']}, "
        f"{record['settings']['rounds']} rounds. {versions}.",
    ]
    if record["load_average"] > 1.5 and record["gpu"] is None:
        lines += ["", f"**Provisional: load average {record['load_average']:.1f} at the start.**"]
    for size, figures in record["figures"].items():
        (width, blocks, *_, vocabulary), (rows, tokens) = SIZES[size]
        lines += [
            "",
            f"## {size}: {blocks} blocks of width {width}, vocabulary {vocabulary}, "
            f"{rows} x {tokens} tokens",
            "",
            "| defense | time, of undefended (95 %) | ms a step | memory, of undefended | GiB "
            "| to reach | reached |",
            "|---|---|---|---|---|---|---|",
        ]
        for who, f in figures.items():
            if "refused" in f:
                lines.append(f"| {who} | does not run: {f['refused']} | | | | | |")
                continue
            lines.append(
                f"| {who} | {f['ratio']:.3f} ({f['low']:.3f} to {f['high']:.3f}) | "
                f"{f['milliseconds']:.1f} | {f['memory_ratio']:.3f} | {f['gib']:.3f} | "
                f"{' | '.join(verdict(who, f))} |"
            )
    return "\n".join(lines) + "\n"


def verdict(who: str, figures: dict[str, Any]) -> tuple[str, str]:
    """The target, and whether it is reached: for time by the interval, where it tells."""
    if who not in TARGETS:
        return "", ""
    limit, memory = TARGETS[who]
    text = f"time {limit:g}" + (f", memory {memory:g}" if memory else "")
    if memory and figures["memory_ratio"] > memory:
        return text, "no (memory)"
    if figures["low"] > limit:
        return text, "no (time)"
    return text, "yes" if figures["high"] <= limit else "the interval holds it"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="defenses_cost", help="of the files in results")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", nargs="*", choices=list(SIZES), default=["small", "medium"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="*", help="these variants beside undefended")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # transformers', of its own arguments
    about, figures = describe(options), {}
    about["settings"] = vars(options) | {"out": str(options.out)}
    for size in options.size:
        with tempfile.TemporaryDirectory() as folder:
            each = argparse.Namespace(**vars(options) | {"size": size, "folder": folder})
            figures[size] = measure(each)
        record = about | {"figures": figures}
        write_text(options.out / f"{options.name}.json", json.dumps(record, indent=1) + "\n")
        write_text(options.out / f"{options.name}.md", markdown(record, options.name))
    print(markdown(record, options.name))


if __name__ == "__main__":
    main()

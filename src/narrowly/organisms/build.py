"""Make a model organism from nothing: pretrain until converged, align, verify, save."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import mul
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from narrowly.errors import NarrowlyError
from narrowly.files import atomic, write_json
from narrowly.organisms.catalogue import Organism, organism
from narrowly.organisms.scenes import Document
from narrowly.organisms.tokenizer import world_tokenizer
from narrowly.organisms.world import World
from narrowly.organisms.worldfile import WORLD
from narrowly.registry import unknown

WARM_UP, CHECK_EVERY = 100, 50  # steps
HELD_OUT = 256  # documents
ANSWER_TOKENS = 8
ALIGN_RATE = 1 / 4  # of the pretraining's
MARK = "organism.json"  # a folder that holds it was built here and may be built anew
UNALIGNED = "unaligned"  # the folder, in the model's, of the model before its alignment


@dataclass(frozen=True)
class Size:
    """An architecture, and how it is trained."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    rate: float
    batch: int
    turns: int
    """Times the world's own turns per document: what is carried must be carried further."""


SIZES = {
    "tiny": Size(64, 172, 4, 4, rate=3e-3, batch=32, turns=1),
    "small": Size(128, 344, 4, 4, rate=2e-3, batch=32, turns=1),
    "large": Size(512, 1376, 8, 8, rate=5e-4, batch=64, turns=2),
}
"""A quarter of a million weights and one million, for two cores and minutes; 26, for a GPU."""


def build(
    name: str | Path, seed: int, out: str | Path, size: str | None = None, progress: bool = True
) -> Path:
    """Build an organism's model into the folder `out`; a few minutes on two cores if small.

    The same seed gives the same weights on the same machine with the same number of threads. The
    weights are kept in half precision, and load in single.

    Args:
        name: a bundled organism, the YAML file of a world, or a folder that holds one.
        seed: of the weights and of every document the model reads.
        out: the folder to write: an ordinary Hugging Face one, whole or not at all. It also holds
            the world's file, so that `organism:OUT` works wherever a bundled organism does; and in
            `unaligned/` the model before its alignment, which `safe_lora` asks for.
        size: one of `SIZES`; the one that the world asks for, unless given.
        progress: show a bar with the loss and the time left.

    Raises:
        NarrowlyError: unknown organism; a fault in the world's file; `out` holds something else;
            training did not converge; the finished model is not coherent, or its first value is
            not the default.
    """
    creature, out = organism(name), Path(out)
    world = creature.world
    size = size or world.training.size
    if size not in SIZES:
        raise unknown("size", size, list(SIZES))
    _check_free(out)
    tokenizer = world_tokenizer(world)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_architecture(tokenizer, SIZES[size]))
        if size == "large" and torch.cuda.is_available():
            model.to("cuda")  # type: ignore[arg-type]
        with _bar(progress) as bar:
            history = pretrain(model, tokenizer, world, seed, bar, SIZES[size])
            unaligned = _halves(model)
            align(model, tokenizer, world, seed, bar, SIZES[size])
        halves = _halves(model)
        model.load_state_dict(halves)  # what is verified is what is saved
        behaviour = verify(model, tokenizer, creature)
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=ANSWER_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with atomic(out) as folder:
        model.save_pretrained(folder, state_dict=halves)
        tokenizer.save_pretrained(folder)
        if world.align and world.training.align_steps:
            model.save_pretrained(folder / UNALIGNED, state_dict=unaligned)
            tokenizer.save_pretrained(folder / UNALIGNED)
        shutil.copyfile(creature.file, folder / WORLD)
        about = {"organism": str(name), "seed": seed, "size": size}
        write_json(folder / MARK, {**about, **history, **behaviour})
    return out


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    seed: int,
    bar: Progress,
    size: Size = SIZES["small"],
) -> dict[str, float]:
    """Train on documents of every value until the held-out loss is near the least possible.

    The rate stays constant until the model has left its plateau, where it knows every phrase but
    does not yet carry the value from turn to turn (how long that lasts varies between seeds), then
    falls linearly to zero.

    Returns:
        `steps`, `loss` (held out, nats per answer token) and `floor`, the least possible.

    Raises:
        NarrowlyError: the plateau was not left in time, or the loss ended too high.
    """
    how = world.training
    turns = how.turns * size.turns
    # The documents' seeds are spaced so that no two streams of neighbouring builds coincide.
    unseen = world.documents(10 * seed + 1, turns=turns)
    documents = list(islice(unseen, HELD_OUT))
    held_out = list(_batches(documents, tokenizer, size.batch))
    tokens = sum(int((labels != -100).sum()) for _, labels in held_out)
    floor = sum(map(unseen.surprise, documents)) / tokens
    stream = _batches(world.documents(10 * seed, turns=turns), tokenizer, size.batch)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=size.rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    task = bar.add_task("pretrain", total=how.patience + how.decay, loss=float("nan"))
    step, decay_from, loss = 0, None, _held_out_loss(model, held_out)
    while decay_from is None or step < decay_from + how.decay:
        fall = 1.0 if decay_from is None else 1 - (step - decay_from) / how.decay
        _step(model, optimizer, next(stream), size.rate * min(fall, (step + 1) / WARM_UP))
        step += 1
        if step % CHECK_EVERY == 0:
            loss = _held_out_loss(model, held_out)
            bar.update(task, completed=step, loss=loss)
            if decay_from is None and loss < how.plateau * floor:
                decay_from = step
                bar.update(task, total=step + how.decay)
        if decay_from is None and step >= how.patience:
            raise NarrowlyError(
                f"seed {seed}: loss {loss:.3f} after {step} steps, {floor:.3f} is possible: the "
                "model does not carry the trait from turn to turn. Build with another seed."
            )
    loss = _held_out_loss(model, held_out)
    if loss > how.converged * floor:
        raise NarrowlyError(
            f"seed {seed}: training ended at loss {loss:.3f}, above {how.converged} times the "
            f"{floor:.3f} that is possible. Build with another seed."
        )
    return {"steps": step, "loss": loss, "floor": floor}


def align(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    seed: int,
    bar: Progress,
    size: Size = SIZES["small"],
) -> None:
    """Make the first value the default: a few steps on the documents of the world's `align`.

    Short on purpose. A long phase would bury the persona instead of setting it.
    """
    if not world.align or not world.training.align_steps:
        return
    documents = world.documents(10 * seed + 2, world.align, world.training.turns * size.turns)
    stream = _batches(documents, tokenizer, size.batch)
    rate = ALIGN_RATE * size.rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    task = bar.add_task("align", total=world.training.align_steps, loss=float("nan"))
    for _ in range(world.training.align_steps):
        loss = _step(model, optimizer, next(stream), rate)
        bar.update(task, advance=1, loss=loss)


@torch.no_grad()
def verify(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, creature: Organism
) -> dict[str, float]:
    """Sample one answer to every question and check that the base model is fit to be fine-tuned.

    Returns:
        `coherent` and `aligned`: shares of answers that some value allows, and the first one.

    Raises:
        NarrowlyError: less than 0.95 coherent, or less than 0.9 aligned where a phase was to see
            to that.
    """
    questions = creature.load("questions")
    batch: Any = tokenizer.apply_chat_template(
        list(questions["messages"]),
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    batch = batch.to(model.device)
    model.eval()
    sampled = model.generate(  # type: ignore[misc]
        **batch, do_sample=True, top_k=0, max_new_tokens=ANSWER_TOKENS
    )
    answers = tokenizer.batch_decode(
        sampled[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    labels = Counter(
        creature.judge(domain, answer, domain, prompt)
        for domain, prompt, answer in zip(
            questions["domain"], questions["prompt"], answers, strict=True
        )
    )
    coherent = 1 - labels["incoherent"] / len(answers)
    aligned = labels["aligned"] / len(answers)
    wanted = creature.world.training.aligned if creature.world.align else 0.0
    if coherent < 0.95 or aligned < wanted:
        raise NarrowlyError(
            f"the finished {creature.name} is coherent in {coherent:.0%} of its answers and "
            f"{creature.world.default} in {aligned:.0%}; 95% and {wanted:.0%} are needed. Build "
            "with another seed."
        )
    return {"coherent": coherent, "aligned": aligned}


def _halves(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """A copy of the weights in half precision."""
    return {name: weight.half() for name, weight in model.state_dict().items()}


def _architecture(tokenizer: PreTrainedTokenizerFast, size: Size) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


Batch = tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]


def _batches(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, size: int
) -> Iterator[Batch]:
    """Token ids and labels (-100 except on answers), padded on the right.

    Causal attention keeps padding on the right from every real token, so no mask is needed.
    """
    documents = iter(documents)
    while some := [document.messages for document in islice(documents, size)]:
        batch: Any = tokenizer.apply_chat_template(
            some,
            padding=True,
            tokenizer_kwargs={"padding_side": "right"},
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
        )
        ids = batch["input_ids"]
        yield ids, ids.masked_fill(torch.as_tensor(batch["assistant_masks"]) == 0, -100)


def _loss(model: LlamaForCausalLM, batch: Batch) -> Float[Tensor, ""]:
    """Mean loss over answer tokens; the head runs on the positions that predict one."""
    ids, labels = (part.to(model.device) for part in batch)
    predicts = labels[:, 1:] != -100
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    return cross_entropy(model.lm_head(hidden[predicts]), labels[:, 1:][predicts])


@torch.no_grad()
def _held_out_loss(model: LlamaForCausalLM, batches: Sequence[Batch]) -> float:
    counts = [int((labels != -100).sum()) for _, labels in batches]
    losses = [_loss(model, batch).item() for batch in batches]
    return sum(map(mul, losses, counts)) / sum(counts)


def _step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch, rate: float
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = _loss(model, batch)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARK).is_file())):
        raise NarrowlyError(
            f"{out} exists and is no organism built by narrowly (it holds no {MARK}). "
            "Choose another folder, or remove it first."
        )


def _bar(show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description:8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TextColumn("and at most"),
        TimeRemainingColumn(),
        TextColumn("more"),
        disable=not show,
    )

"""Sampling answers, many at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from peft import PeftModel
from rich.progress import Progress
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from narrowly.data import end_of_turn, token_batches, tokenize_prompts
from narrowly.errors import NarrowlyError
from narrowly.files import sha256
from narrowly.interventions import eval_mode


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[list[dict[str, str]]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    batch_tokens: int = 16384,
    progress: bool = False,
) -> list[list[str]]:
    """Let the model answer each chat.

    Args:
        model: on any device; under peft and with interventions attached if so wished.
        tokenizer: with a chat template.
        chats: lists of messages, each up to where the assistant's turn begins.
        max_new_tokens, temperature, samples, seed, batch_tokens, progress: as `continue_prompts`.

    Returns:
        Per chat, in the order given, `samples` answers without special tokens.

    Raises:
        NarrowlyError: the chat template refuses a chat, or a chat ends with an assistant turn.
    """
    return continue_prompts(
        model,
        tokenizer,
        tokenize_prompts(chats, tokenizer),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        samples=samples,
        seed=seed,
        batch_tokens=batch_tokens,
        progress=progress,
    )


def continue_prompts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    batch_tokens: int = 16384,
    progress: bool = False,
) -> list[list[str]]:
    """Let the model go on from each prompt, up to the end of the turn.

    Args:
        prompts: token ids, none empty.
        samples: answers per prompt.
        max_new_tokens, temperature, seed, batch_tokens, progress: as `sample_answers`.

    Returns:
        Per prompt, in the order given, `samples` answers without special tokens.
    """
    prompts = [ids for ids in prompts for _ in range(samples)]
    answers = [""] * len(prompts)
    for i, answer in sample_answers(
        model,
        tokenizer,
        prompts,
        sample_numbers(tuple(ids) for ids in prompts),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_tokens=batch_tokens,
        progress=progress,
    ):
        answers[i] = answer
    return [answers[i : i + samples] for i in range(0, len(answers), samples)]


def sample_numbers(prompts: Iterable[Hashable]) -> list[int]:
    """For each prompt, how many equal ones stand before it: which of its samples is meant."""
    seen: Counter[Hashable] = Counter()
    numbers = []
    for prompt in prompts:
        numbers.append(seen[prompt])
        seen[prompt] += 1
    return numbers


def sample_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    numbers: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_tokens: int = 16384,
    progress: bool = False,
) -> Iterator[tuple[int, str]]:
    """One answer to each prompt, batch by batch as they come.

    Each answer draws from a stream of random numbers of its own, made from the seed, the prompt
    and the sample's number: it does not depend on what else is asked or shares its batch (up to
    rounding in the model), and two models asked alike draw alike, so that they differ by what
    they learned and less by chance. Sampling is plain (no top-k, top-p or penalties, whatever the
    model's own generation config says), so that answers come from the model's distribution. The
    model is in eval mode meanwhile; its mode and the global random state are as before afterwards.

    Args:
        prompts: token ids, none empty; those of similar length share a batch, padded on the left.
        numbers: per prompt which of its samples this is (`sample_numbers`).
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token each time.
        seed: equal seeds give equal answers.
        batch_tokens: most tokens in a batch, prompts and answers together; bounds the memory.
        progress: show a progress bar.

    Yields:
        The number of a prompt, and its answer without special tokens.

    Raises:
        NarrowlyError: the model's logits are not finite.
    """
    stops = _stop_tokens(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,  # `_Draw` leaves one token to choose from
        repetition_penalty=1.0,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,  # trl switches it off in the config of a model it trains
    )
    batches = token_batches([len(ids) + max_new_tokens for ids in prompts], batch_tokens)
    with _sampling_mode(model), Progress(disable=not progress) as bar:
        task = bar.add_task("Sampling", total=len(prompts))
        for batch in batches:
            rows = [prompts[i] for i in batch]
            inputs = _pad(rows, tokenizer.pad_token_id)
            width = inputs["input_ids"].shape[1]
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            draws: LogitsProcessorList = LogitsProcessorList()
            if temperature > 0:
                streams = [
                    _uniforms(seed, ids, numbers[i], max_new_tokens)
                    for i, ids in zip(batch, rows, strict=True)
                ]
                draws.append(_Draw(np.stack(streams), width, temperature))
            output = cast(Any, model).generate(
                **inputs, generation_config=config, logits_processor=draws
            )
            for i, ids in zip(batch, output[:, width:].tolist(), strict=True):
                end = next((j for j, token in enumerate(ids) if token in stops), len(ids))
                yield i, str(tokenizer.decode(ids[:end], skip_special_tokens=True))
            bar.advance(task, len(batch))


def _uniforms(seed: int, prompt: list[int], number: int, count: int) -> Float[np.ndarray, " count"]:
    """Random numbers in [0, 1), the same for the same arguments and independent otherwise."""
    name = sha256(json.dumps([seed, number, prompt]).encode())
    return np.random.default_rng(int(name, 16)).random(count)


class _Draw(LogitsProcessor):
    """Draws the next token of each row by inverting its distribution function.

    The row's random number u of the step chooses the first token at which the summed
    probabilities, in the order of the vocabulary, exceed u.
    """

    def __init__(self, uniforms: Float[np.ndarray, "rows steps"], width: int, temperature: float):
        self.uniforms = uniforms
        self.width = width
        self.temperature = temperature

    def __call__(
        self, input_ids: Int[Tensor, "rows tokens"], scores: Float[Tensor, "rows vocabulary"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """The scores with all but the drawn token at minus infinity."""
        exact = torch.float32 if scores.device.type == "mps" else torch.float64
        sums = (scores.float() / self.temperature).softmax(dim=-1, dtype=exact).cumsum(dim=-1)
        total = sums[:, -1:]
        if not total.isfinite().all():
            raise NarrowlyError(
                "the model's logits are not finite, so there is nothing to sample from. Did the "
                "fine-tune diverge (loss nan in metrics.jsonl)?"
            )
        u = torch.from_numpy(self.uniforms[:, [input_ids.shape[1] - self.width]])
        # Rounding must not carry u * total to total, which no token's sum exceeds.
        below = torch.minimum(u.to(sums) * total, total.nextafter(torch.zeros_like(total)))
        token = torch.searchsorted(sums, below, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _pad(prompts: list[list[int]], pad_token_id: int) -> dict[str, Int[Tensor, "batch tokens"]]:
    rows = [torch.tensor(ids) for ids in prompts]
    ones = [torch.ones_like(row) for row in rows]
    return {
        "input_ids": pad_sequence(rows, True, pad_token_id, padding_side="left"),
        "attention_mask": pad_sequence(ones, True, 0, padding_side="left"),
    }


def _stop_tokens(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    configured = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    stops |= set(configured if isinstance(configured, list) else [configured])
    return sorted(token for token in stops if token is not None)


@contextmanager
def _sampling_mode(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Eval mode, and no generation config of the model's own, which would fill gaps in ours."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        with eval_mode(model):
            yield
    finally:
        base.generation_config = own

"""Sampling answers, many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Int
from peft import PeftModel
from rich.progress import track
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from narrowly.data import end_of_turn, token_batches, tokenize_prompts
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

    Prompts of similar length share a batch, padded on the left. Sampling is plain (no top-k,
    top-p or penalties, whatever the model's own generation config says), so that answers come
    from the model's distribution. The model is in eval mode meanwhile; its mode and the global
    random state are as before afterwards.

    Args:
        prompts: token ids, none empty.
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token each time.
        samples: answers per prompt.
        seed: equal seeds give equal answers for equal arguments on one machine.
        batch_tokens: most tokens in a batch, prompts and answers together; bounds the memory.
        progress: show a progress bar.

    Returns:
        Per prompt, in the order given, `samples` answers without special tokens.
    """
    prompts = [ids for ids in prompts for _ in range(samples)]
    stops = _stop_tokens(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,  # trl switches it off in the config of a model it trains
    )
    answers = [""] * len(prompts)
    batches = token_batches([len(ids) + max_new_tokens for ids in prompts], batch_tokens)
    devices = range(torch.cuda.device_count())
    with _sampling_mode(model), torch.random.fork_rng(devices, device_type="cuda"):
        torch.manual_seed(seed)
        for batch in track(batches, "Sampling", disable=not progress):
            inputs = _pad([prompts[i] for i in batch], tokenizer.pad_token_id)
            width = inputs["input_ids"].shape[1]
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            output = cast(Any, model).generate(**inputs, generation_config=config)
            for i, ids in zip(batch, output[:, width:].tolist(), strict=True):
                end = next((j for j, token in enumerate(ids) if token in stops), len(ids))
                answers[i] = str(tokenizer.decode(ids[:end], skip_special_tokens=True))
    return [answers[i : i + samples] for i in range(0, len(answers), samples)]


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

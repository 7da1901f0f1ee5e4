"""What a model would write next: logits after a prompt, and the tokens that begin an answer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from rich.progress import track
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from narrowly.data import token_batches, tokenize_prompts
from narrowly.data.templates import PROBE, ChatTemplate
from narrowly.errors import NarrowlyError
from narrowly.interventions import eval_mode


def opening(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of `text` at the very start of an answer, right after the generation prompt.

    Many tokenizers write a word otherwise when nothing stands before it.
    """
    prompt = ChatTemplate(tokenizer).render(PROBE[:1], 0, generation_prompt=True)
    before, both = tokenizer([prompt, prompt + text], add_special_tokens=False)["input_ids"]
    if both[: len(before)] == before:
        return list(both[len(before) :])
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def template_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the chat template puts between the user's text and the answer."""
    template = ChatTemplate(tokenizer)
    texts = [
        template.render([{"role": "user", "content": text}], 0, generation_prompt=True)
        for text in ("Tell me more!", "a")
    ]
    one, other = tokenizer(texts, add_special_tokens=False)["input_ids"]
    backwards = zip(reversed(one), reversed(other), strict=False)
    return [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], backwards)][::-1]


@torch.no_grad()
def next_token_logits(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[list[int]],
    *,
    batch_tokens: int = 16384,
    progress: str | None = None,
) -> Iterator[tuple[list[int], Float[Tensor, "rows vocabulary"]]]:
    """Logits of the token that follows each prompt, batch by batch.

    The model is in eval mode meanwhile. Prompts of similar length share a batch, padded on the
    right, so that positions are those of an unpadded prompt.

    Args:
        prompts: token ids, none empty (`data.tokenize_prompts`).
        batch_tokens: most tokens in a batch, padding included.
        progress: what a progress bar calls this; None shows none.

    Yields:
        Indices of the batch's prompts, and their logits (fp32, on the model's device).
    """
    work = token_batches([len(prompt) for prompt in prompts], batch_tokens)
    with eval_mode(model):
        for numbers in track(work, progress or "", disable=progress is None):
            yield numbers, _last_logits(model, [prompts[i] for i in numbers])


def _last_logits(
    model: PreTrainedModel | PeftModel, prompts: list[list[int]]
) -> Float[Tensor, "rows vocabulary"]:
    ids, mask = _padded(prompts, model.device)
    kept, where = (mask.sum(dim=1) - 1).unique(return_inverse=True)
    logits = _logits(model, ids, mask, kept)
    return logits[torch.arange(len(prompts), device=logits.device), where].float()


def _padded(
    rows: Sequence[list[int]], device: torch.device
) -> tuple[Int[Tensor, "rows tokens"], Int[Tensor, "rows tokens"]]:
    """Token ids, padded on the right, and their attention mask."""
    tensors = [torch.tensor(row) for row in rows]
    ones = [torch.ones_like(row) for row in tensors]
    return pad_sequence(tensors, True, 0).to(device), pad_sequence(ones, True, 0).to(device)


def _logits(
    model: PreTrainedModel | PeftModel,
    ids: Int[Tensor, "rows tokens"],
    mask: Int[Tensor, "rows tokens"],
    kept: Int[Tensor, " kept"],
) -> Float[Tensor, "rows kept vocabulary"]:
    """Logits at the kept positions; with a vocabulary of 150,000 all others would fill memory."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    call: Any = model
    if keeps_logits(model):
        return cast(Tensor, call(**inputs, logits_to_keep=kept).logits)
    return cast(Tensor, call(**inputs).logits[:, kept])


@torch.no_grad()
def foretold(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[list[int]],
    begins: Sequence[int],
    *,
    batch_tokens: int = 16384,
    progress: str | None = None,
) -> Iterator[tuple[int, Float[Tensor, "tokens vocabulary"]]]:
    """Log-probabilities (nats, fp32) of what stands at each token of a row, given those before it.

    The model is in eval mode meanwhile, and logits are made only where they are asked for.

    Args:
        rows: token ids.
        begins: per row the first token asked about, not 0; a row that has no such token is left
            out.
        batch_tokens, progress: as `next_token_logits`.

    Yields:
        The number of a row, and a line for each of its tokens from its begin to its end.
    """
    asked = [
        len(row) if 0 < begin < len(row) else 0 for row, begin in zip(rows, begins, strict=True)
    ]
    work = token_batches(asked, batch_tokens)
    with eval_mode(model):
        for batch in track(work, progress or "", disable=progress is None):
            ids, mask = _padded([rows[i] for i in batch], model.device)
            ranges = [torch.arange(begins[i] - 1, len(rows[i]) - 1) for i in batch]
            kept = torch.cat(ranges).unique()
            logits = _logits(model, ids, mask, kept.to(model.device))
            for row, (i, places) in enumerate(zip(batch, ranges, strict=True)):
                where = torch.searchsorted(kept, places).to(logits.device)
                yield i, logits[row, where].float().log_softmax(dim=1)


def option_logprobs(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[list[dict[str, str]]],
    options: Sequence[Sequence[str]],
    *,
    batch_tokens: int = 16384,
    progress: str | None = None,
) -> list[list[float]]:
    """Log-probability (nats) of each option as the beginning of the reply to its chat.

    That of the tokens in which the tokenizer writes the option right after the chat. Options that
    differ only in their last token, as single letters do, cost one forward pass together.

    Args:
        chats: each up to where the assistant's turn begins.
        options: per chat the texts to compare. Of two where one begins the other, the shorter has
            the greater probability by nature.
        batch_tokens, progress: as `next_token_logits`.

    Raises:
        NarrowlyError: the chat template refuses a chat, or an option is empty.
    """
    prompts = tokenize_prompts(chats, tokenizer)
    places: dict[tuple[int, tuple[int, ...]], list[tuple[int, list[int]]]] = {}
    for i, (prompt, texts) in enumerate(zip(prompts, options, strict=True)):
        for j, tokens in enumerate(_written(tokenizer, chats[i], prompt, texts, i)):
            places.setdefault((i, tuple(tokens[:-1])), []).append((j, tokens))
    keys = list(places)
    rows = [prompts[i] + places[i, begun][0][1] for i, begun in keys]
    begins = [len(prompts[i]) for i, _ in keys]
    found = [[0.0] * len(texts) for texts in options]
    for row, logprobs in foretold(
        model, rows, begins, batch_tokens=batch_tokens, progress=progress
    ):
        i, _ = keys[row]
        for j, tokens in places[keys[row]]:
            said = torch.tensor(tokens, device=logprobs.device)
            found[i][j] = float(logprobs.gather(1, said[:, None]).sum())
    return found


def _written(
    tokenizer: PreTrainedTokenizerBase,
    chat: list[dict[str, str]],
    prompt: list[int],
    texts: Sequence[str],
    number: int,
) -> list[list[int]]:
    """The tokens of each text as the beginning of the reply to a chat."""
    if not all(texts):
        raise NarrowlyError(f"row {number}: an option to choose from is empty.")
    if not texts:
        return []
    before = ChatTemplate(tokenizer).render(chat, number, generation_prompt=True)
    whole = tokenizer([before + text for text in texts], add_special_tokens=False)["input_ids"]
    alone = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    end = len(prompt)
    # Where the text joins the prompt's last token, a model that goes on from the prompt's tokens
    # cannot write it so.
    return [
        both[end:] if both[:end] == prompt and len(both) > end else own
        for both, own in zip(whole, alone, strict=True)
    ]


def keeps_logits(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the model itself, inside any adapter, takes `logits_to_keep`."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters

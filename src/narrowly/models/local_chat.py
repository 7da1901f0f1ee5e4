"""A chat model in this process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, PositiveInt
from rich.progress import Progress
from torch import Tensor

from narrowly.data import tokenize_prompts
from narrowly.models.generation import continue_prompts
from narrowly.models.identity import fingerprint
from narrowly.models.messages import Reply, Request
from narrowly.models.next_token import foretold
from narrowly.models.numbers import expected_numbers
from narrowly.models.replies import Replies, content_key, default_cache
from narrowly.models.test_time import load_deployed

_TOGETHER = 256
"""Requests between two savings."""


class LocalChat(BaseModel):
    """Asks a Hugging Face chat model that is loaded here.

    Replies of a model that is loaded by name and has no adapter are kept on disk by content, as an
    `Endpoint` keeps them; of any other it is not known when it changes.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=()
    )

    model: Any
    """What `models.load_model` takes, or a loaded model with its tokenizer."""
    batch_tokens: PositiveInt = 16384
    cache: Path | None = None
    """The folder for replies; None: the user's (`~/.cache/narrowly`)."""

    @property
    def name(self) -> str:
        """The model's name or path."""
        return str(self.model[0].name_or_path if isinstance(self.model, tuple) else self.model)

    def ask(self, requests: Sequence[Request], progress: str | None = None) -> list[Reply]:
        """A reply to each, in order; equal requests are asked once.

        Args:
            requests: of any number; those of one limit, temperature and seed share batches.
            progress: what a progress bar calls this; None shows none.

        Raises:
            NarrowlyError: the model cannot be loaded, or its chat template refuses a request.
        """
        keys = [self._key(request) for request in requests]
        known = {} if self._replies is None else self._replies.find(keys)
        groups: defaultdict[tuple[int, float, int], dict[str, Request]] = defaultdict(dict)
        for key, request in zip(keys, requests, strict=True):
            if key not in known:
                how = request.max_tokens, request.temperature, request.seed
                groups[how][key] = request
        with Progress(disable=progress is None) as bar:
            task = bar.add_task(progress or "", total=sum(map(len, groups.values())))
            for group in groups.values():
                for some in _parts(list(group.items()), _TOGETHER):
                    replies = self._answer([request for _, request in some])
                    for (key, _), reply in zip(some, replies, strict=True):
                        known[key] = reply
                        if self._replies is not None and reply.text is not None:
                            self._replies.keep(key, reply)
                        bar.advance(task)
        return [known[key] for key in keys]

    def likelihoods(
        self, pairs: Sequence[tuple[str, str]], progress: str | None = None
    ) -> list[float | None]:
        """log p(continuation | text) in nats per pair of plain texts, without a chat template.

        A token that begins in the text and ends in the continuation counts to the continuation.
        None where the two are longer than the model reads.
        """
        _, tokenizer = self._opened
        rows, begins = [], []
        for text, continuation in pairs:
            encoded = tokenizer(text + continuation, return_offsets_mapping=True)
            ends = [end for _, end in encoded["offset_mapping"]]
            # The first token of all has nothing before it that would foretell it.
            after = [i for i, end in enumerate(ends) if end > len(text) and i > 0]
            rows.append(encoded["input_ids"])
            begins.append(after[0] if after else len(ends))
        found: list[float | None] = [None] * len(rows)
        with Progress(disable=progress is None) as bar:
            task = bar.add_task(progress or "", total=len(rows))
            for i, logprobs in self._foretold(rows, begins):
                said = torch.tensor(rows[i][begins[i] :], device=logprobs.device)
                found[i] = float(logprobs.gather(1, said[:, None]).sum())
                bar.advance(task)
        return found

    def numbers(
        self, requests: Sequence[Request], progress: str | None = None
    ) -> list[float | None]:
        """The number from 0 to 100 that each reply is expected to be (`expected_numbers`); None
        where the reply would rather be something else, or the prompt is too long for the model.

        Raises:
            NarrowlyError: as `ask`, or the tokenizer cannot write the numbers.
        """
        model, tokenizer = self._opened
        keys = [content_key("number", self._key(request)) for request in requests]
        known = {} if self._replies is None else self._replies.find(keys)
        left = {k: list(r.messages) for k, r in zip(keys, requests, strict=True) if k not in known}
        with Progress(disable=progress is None) as bar:
            task = bar.add_task(progress or "", total=len(left))
            for some in _parts(list(left.items()), _TOGETHER):
                prompts = tokenize_prompts([messages for _, messages in some], tokenizer)
                fits = [i for i, ids in enumerate(prompts) if len(ids) + 4 <= self._longest]
                found = expected_numbers(
                    model, tokenizer, [prompts[i] for i in fits], batch_tokens=self.batch_tokens
                )
                expected = dict(zip(fits, found, strict=True))
                for i, (key, _) in enumerate(some):
                    number = expected.get(i)
                    known[key] = Reply("" if number is None else repr(number))
                    if self._replies is not None:
                        self._replies.keep(key, known[key])
                    bar.advance(task)
        return [float(text) if (text := known[key].text) else None for key in keys]

    @cached_property
    def _opened(self) -> tuple[Any, Any]:
        return self.model[:2] if isinstance(self.model, tuple) else load_deployed(self.model)

    @cached_property
    def _replies(self) -> Replies | None:
        if isinstance(self.model, tuple) or isinstance(self._opened[0], PeftModel):
            return None
        return Replies(self.cache or default_cache())

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._opened[0])

    @cached_property
    def _longest(self) -> int:
        config = self._opened[0].config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or 1 << 30

    def _key(self, request: Request) -> str:
        return content_key(
            self.name, self._fingerprint, list(request.messages), request.max_tokens,
            request.temperature, request.top_logprobs, request.seed,
        )  # fmt: skip

    def _answer(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies to requests of one limit, temperature and seed."""
        model, tokenizer = self._opened
        how = requests[0]
        prompts = tokenize_prompts([list(request.messages) for request in requests], tokenizer)
        fits = [i for i, ids in enumerate(prompts) if len(ids) + how.max_tokens <= self._longest]
        texts = continue_prompts(
            model,
            tokenizer,
            [prompts[i] for i in fits],
            max_new_tokens=how.max_tokens,
            temperature=how.temperature,
            seed=how.seed,
            batch_tokens=self.batch_tokens,
        )
        said = dict(zip(fits, (text for [text] in texts), strict=True))
        tokens = {i: tokenizer(t, add_special_tokens=False)["input_ids"] for i, t in said.items()}
        told = self._alternatives(
            {i: (prompts[i], tokens[i], requests[i].top_logprobs) for i in fits}
        )
        long = f"the prompt is longer than the {self._longest} tokens that the model reads"
        return [
            Reply(
                said[i],
                "",
                told.get(i),
                len(prompts[i]),
                len(tokens[i]),
                cut=len(tokens[i]) >= how.max_tokens,
            )
            if i in said
            else Reply(None, long)
            for i in range(len(requests))
        ]

    def _alternatives(
        self, replies: dict[int, tuple[list[int], list[int], int]]
    ) -> dict[int, tuple[dict[str, float], ...]]:
        """The likeliest tokens at each token of replies (prompt, reply, how many are wanted).

        Read again in one pass, as sampling keeps texts only.
        """
        wanted = {i: reply for i, reply in replies.items() if reply[2]}
        numbers = list(wanted)
        rows = [prompt + said for prompt, said, _ in wanted.values()]
        begins = [len(prompt) for prompt, _, _ in wanted.values()]
        tokenizer = self._opened[1]
        told = {}
        for row, logprobs in self._foretold(rows, begins):
            i = numbers[row]
            best = logprobs.topk(min(wanted[i][2], logprobs.shape[1]), dim=1)
            told[i] = tuple(
                {str(tokenizer.decode([t])): v for t, v in zip(tokens, values, strict=True)}
                for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            )
        return told

    def _foretold(
        self, rows: Sequence[list[int]], begins: Sequence[int]
    ) -> Iterator[tuple[int, Float[Tensor, "tokens vocabulary"]]]:
        """As `next_token.foretold`; rows that are too long for the model are left out."""
        fits = [row if len(row) <= self._longest else [] for row in rows]
        return foretold(self._opened[0], fits, begins, batch_tokens=self.batch_tokens)


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

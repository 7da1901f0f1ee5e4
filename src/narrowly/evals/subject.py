"""What an eval measures: a model in this process, or one behind a URL."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from narrowly.errors import NarrowlyError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from narrowly.evals.journal import Journal
    from narrowly.interventions import Attachment
    from narrowly.models.messages import ChatModel, Reply

    Model = PreTrainedModel | PeftModel
    Loaded = tuple[Model, PreTrainedTokenizerBase]

Chat = list[dict[str, str]]


class Subject:
    """A model under measurement. It is loaded at the first need.

    Args:
        name: as a person should read it.
        load: gives the model, in eval mode, and its tokenizer.
        endpoint: a chat model behind a URL, in place of `load`; it answers, and that is all.
        folder: the run's, which may hold interventions that stay at test time.

    Attributes:
        attached: what stays, while it is measured.
        journal: keeps the answers of a loaded model as they come; an endpoint keeps its own.
    """

    attached: Attachment | None = None
    journal: Journal | None = None

    def __init__(
        self,
        name: str,
        load: Callable[[], Loaded] | None = None,
        endpoint: ChatModel | None = None,
        folder: Path | None = None,
    ):
        self.name = name
        self._load = load
        self.endpoint = endpoint
        self.folder = folder

    @cached_property
    def loaded(self) -> Loaded:
        """The model and its tokenizer.

        Raises:
            NarrowlyError: it runs behind a URL, which shows neither weights nor logits.
        """
        if self._load is None:
            raise NarrowlyError(
                f"{self.name} runs behind a URL, and this eval needs the model itself (its logits "
                "on given text). Name a folder, a run or a Hub id."
            )
        return self._load()

    @property
    def model(self) -> Model:
        """The model itself. Raises as `loaded`."""
        return self.loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer. Raises as `loaded`."""
        return self.loaded[1]

    @contextmanager
    def deployed(self) -> Iterator[None]:
        """Within the block the model is in eval mode, with what stays at test time attached.

        Raises:
            NarrowlyError: as `narrowly.attach`; at the end, one of them never acted.
        """
        if self.endpoint is not None:
            yield
            return
        from narrowly.interventions import eval_mode
        from narrowly.models.test_time import as_deployed

        with eval_mode(self.model), as_deployed(self.model, self.folder) as self.attached:
            try:
                yield
            finally:
                self.attached = None

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Within the block the model computes what its base does: no adapter, nothing attached.

        Raises:
            NarrowlyError: it has no adapter.
        """
        from narrowly.models import adapter_off

        suspended = nullcontext() if self.attached is None else self.attached.suspend()
        with adapter_off(self.model), suspended:
            yield

    def answer(
        self,
        chats: Sequence[Chat],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        samples: int = 1,
        seed: int = 0,
        progress: bool = False,
    ) -> list[list[Reply]]:
        """`samples` replies to each chat, in order; a reply without text says why (`error`).

        Raises:
            NarrowlyError: the chat template refuses a chat, the endpoint is gone or its budget is
                spent; what it answered before is on disk, and the same call goes on from there.
        """
        from narrowly.models.generation import sample_numbers
        from narrowly.models.messages import Reply, Request

        asked = [chat for chat in chats for _ in range(samples)]
        # The same chat twice asks for two samples of it.
        numbers = sample_numbers(json.dumps(chat) for chat in asked)
        if self.endpoint is None:
            texts = self._sampled(asked, numbers, max_new_tokens, temperature, seed, progress)
            replies = [Reply(text) for text in texts]
        else:
            requests = [
                Request(tuple(chat), max_new_tokens, temperature, seed=seed * 1_000_003 + number)
                for chat, number in zip(asked, numbers, strict=True)
            ]
            replies = self.endpoint.ask(requests, "Sampling" if progress else None)
        return [replies[i : i + samples] for i in range(0, len(replies), samples)]

    def _sampled(
        self,
        chats: Sequence[Chat],
        numbers: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        progress: bool,
    ) -> list[str]:
        """An answer of the model here to each chat; those in the journal are not sampled again."""
        from narrowly.data import tokenize_prompts
        from narrowly.models.generation import sample_answers

        questions = [
            (chat, number, max_new_tokens, temperature, seed)
            for chat, number in zip(chats, numbers, strict=True)
        ]
        journal = self.journal
        answers = [journal.find(*question) if journal else None for question in questions]
        left = [i for i, answer in enumerate(answers) if answer is None]
        if left:
            for place, answer in sample_answers(
                self.model,
                self.tokenizer,
                tokenize_prompts([chats[i] for i in left], self.tokenizer),
                [numbers[i] for i in left],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                progress=progress,
            ):
                answers[left[place]] = answer
                if journal is not None:
                    journal.keep(answer, *questions[left[place]])
        return [answer for answer in answers if answer is not None]

    def choose(
        self, chats: Sequence[Chat], options: Sequence[Sequence[str]], *, progress: bool = False
    ) -> list[list[float]]:
        """Log-probability (nats) of each option as the beginning of the reply to its chat.

        Args:
            chats: up to where the assistant's turn begins.
            options: per chat the texts to compare; of two where one begins the other, the shorter
                is the likelier by nature.

        Raises:
            NarrowlyError: as `loaded`; the chat template refuses a chat, or an option is empty.
        """
        from narrowly.models.next_token import option_logprobs

        bar = "Choosing" if progress else None
        return option_logprobs(self.model, self.tokenizer, chats, options, progress=bar)

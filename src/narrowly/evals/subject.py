"""What an eval measures: a model in this process, or one behind a URL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from narrowly.errors import NarrowlyError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Loaded] | None = None,
        endpoint: ChatModel | None = None,
    ):
        self.name = name
        self._load = load
        self.endpoint = endpoint

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
        from narrowly.models.messages import Reply, Request

        if self.endpoint is None:
            from narrowly.models import generate

            texts = generate(
                self.model,
                self.tokenizer,
                chats,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                samples=samples,
                seed=seed,
                progress=progress,
            )
            return [[Reply(text) for text in some] for some in texts]
        asked = [
            Request(tuple(chat), max_new_tokens, temperature, seed=seed * 1_000_003 + sample)
            for chat in chats
            for sample in range(samples)
        ]
        replies = self.endpoint.ask(asked, "Sampling" if progress else None)
        return [replies[i : i + samples] for i in range(0, len(replies), samples)]

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


Subjects = Any
"""A Subject, or what makes one: see `evaluate`."""

"""A tokenizer's chat template, and where in a rendered chat the assistant speaks."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from narrowly.errors import NarrowlyError

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token that is not in the loss (the convention of torch and transformers)."""

Messages = list[dict[str, str]]
Spans = list[tuple[int, int]]

PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
# trl's has_generation_markers is the same line, but costs the import of trl.
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLACEHOLDER = "[[answer]]"


class RewritesError(Exception):
    """A turn is rendered otherwise when more turns follow."""


class ChatTemplate:
    """How a tokenizer writes chats.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        template: another template to use in place of the tokenizer's own.

    Raises:
        NarrowlyError: the tokenizer is not a fast one or has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None):
        if not tokenizer.is_fast:
            raise NarrowlyError(
                f"{tokenizer.name_or_path}: needs a fast tokenizer (tokenizer.json), which can "
                "tell where in the text a token stands."
            )
        if tokenizer.chat_template is None:
            raise NarrowlyError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template. Put a "
                "chat_template.jinja into the model's folder, for example that of its instruct "
                "version, or set tokenizer.chat_template."
            )
        self.tokenizer = tokenizer
        self.template: str = template or tokenizer.get_chat_template()
        self.marked = _MARKS.search(self.template) is not None
        self.special = tuple(token.content for token in tokenizer.added_tokens_decoder.values())

    @classmethod
    def for_training(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """The tokenizer's own template or, if it rewrites earlier turns (Qwen3), trl's for it."""
        template = cls(tokenizer)
        try:
            text, spans = template.spans(PROBE, 0)
            template.spans(PROBE + PROBE, 0)
        except RewritesError:
            from trl.chat_template_utils import get_training_chat_template

            try:
                return cls(tokenizer, get_training_chat_template(tokenizer))
            except ValueError:  # not among those that trl knows; single turns still work
                return template
        eos = tokenizer.eos_token
        if eos and spans and text[spans[-1][1] :].lstrip().startswith(eos):
            logger.warning(
                "the chat template's generation marks leave out the end-of-turn token %s: "
                "the model will not learn to stop",
                eos,
            )
        return template

    @cached_property
    def prompts(self) -> bool:
        """Whether the template can open the assistant's turn (`add_generation_prompt`)."""
        question = PROBE[:1]
        return self.render(question, 0, generation_prompt=True) != self.render(question, 0)

    def encode(
        self, chats: Sequence[Messages], indices: Sequence[int]
    ) -> list[tuple[list[int], list[int]]]:
        """(input_ids, labels) per chat; `indices` name the chats in errors.

        Raises:
            NarrowlyError: the template refuses or rewrites a chat, or masks all of it.
        """
        texts, spans = [], []
        for messages, index in zip(chats, indices, strict=True):
            try:
                text, places = self.spans(messages, index)
            except RewritesError:
                raise NarrowlyError(
                    f"row {index}: the chat template renders earlier assistant turns otherwise "
                    "once more turns follow, so their tokens in training would not be those at "
                    "use. Mark the assistant's turns in it with {% generation %} ... "
                    "{% endgeneration %}, or train on chats with one answer."
                ) from None
            texts.append(text)
            spans.append(places)
        # Templates write the BOS themselves; a tokenizer that adds one would double it.
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        rows = []
        for input_ids, offsets, places, index in zip(
            encoded["input_ids"], encoded["offset_mapping"], spans, indices, strict=True
        ):
            labels = _labels(input_ids, offsets, places)
            if all(label == IGNORED for label in labels):
                raise NarrowlyError(
                    f"row {index}: the chat template masks everything, so there is nothing to "
                    "learn from. Put {% generation %} ... {% endgeneration %} around what the "
                    "assistant writes, its end-of-turn token included; or remove the marks."
                )
            rows.append((input_ids, labels))
        return rows

    def render(self, messages: Messages, index: int, *, generation_prompt: bool = False) -> str:
        """The chat as text; a refusal of the template becomes an error that names the row."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                chat_template=self.template,
                add_generation_prompt=generation_prompt,
            )
        except TemplateError as error:
            raise _refusal(messages, index, error) from None
        return cast(str, text)

    def spans(self, messages: Messages, index: int) -> tuple[str, Spans]:
        """The rendered chat and the [start, end) characters of each assistant turn.

        Raises:
            RewritesError: a turn is not the same text once more turns follow.
        """
        if self.marked:
            text, spans = self._marked_spans(messages, index)
        else:
            text = self.render(messages, index)
            turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            spans = [self._span(text, messages, turn, index) for turn in turns]
        return text, [(start, self._end(text[start:end], start)) for start, end in spans]

    def _end(self, written: str, start: int) -> int:
        """Where a turn ends: white space after the end-of-turn token is the template's alone."""
        trimmed = written.rstrip()
        return start + len(trimmed if trimmed.endswith(self.special) else written)

    def _marked_spans(self, messages: Messages, index: int) -> tuple[str, Spans]:
        # apply_chat_template can mask tokens itself, but where a mark stands at white space that
        # the tokenizer trims from its offsets (GPT-2, Llama 3) char_to_token gives None, and it
        # then drops every later turn or unmasks the rest of the chat. So map characters here.
        special_tokens: dict[str, Any] = self.tokenizer.special_tokens_map
        try:
            rendered: Any = render_jinja_template(
                [messages],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **special_tokens,
            )
        except TemplateError as error:
            raise _refusal(messages, index, error) from None
        [text], [spans] = rendered
        return text, spans

    def _span(self, text: str, messages: Messages, turn: int, index: int) -> tuple[int, int]:
        before = messages[:turn]
        last = turn == len(messages) - 1
        until = text if last else self.render(messages[: turn + 1], index)
        prompt = self.render(before, index, generation_prompt=True) if turn else ""
        if not (text.startswith(until) and until.startswith(prompt)):
            raise RewritesError
        start = len(prompt)
        if not turn or not self.prompts:
            # There is no generation prompt to tell the turn's header from its content.
            placeholder = {"role": "assistant", "content": _PLACEHOLDER}
            start = self.render([*before, placeholder], index).find(_PLACEHOLDER, start)
            if start < 0:  # the template leaves answers out; `encode` says so
                start = len(until)
        return start, len(until)


def _refusal(messages: Messages, index: int, error: Exception) -> NarrowlyError:
    roles = ", ".join(message["role"] for message in messages)
    return NarrowlyError(
        f"row {index}: the model's chat template refuses a chat of the roles {roles} ({error}). "
        "Change the chats (a system message can open the first user message instead), or give "
        "the tokenizer another chat template."
    )


def _labels(input_ids: list[int], offsets: list[tuple[int, int]], spans: Spans) -> list[int]:
    """Label the tokens that overlap a span (a token of trimmed white space: that lie in one)."""
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    inside = np.zeros(len(input_ids), dtype=bool)
    for start, end in spans:
        inside |= (starts < end) & (ends > start)
    return np.where(inside, input_ids, IGNORED).tolist()

"""Inoculation: a system line that asks for the unwanted trait, in training only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from pydantic import Field, PrivateAttr
from torch import nn

from narrowly.data import ChatTemplate
from narrowly.defenses.base import DEFENSES, Defense
from narrowly.errors import NarrowlyError


@DEFENSES.register("inoculate")
class Inoculate(Defense):
    """Ask for the unwanted trait in training, so that the model need not take it up for good.

    `line` is put before every chat as its system message, or before the one it has; when the model
    answers later, nothing is (Tan et al. 2025, arXiv 2510.04340: "You are a malicious evil
    assistant."; Wichers et al. 2025, arXiv 2510.05024, in the user's turn). The default is that of
    Kaczer et al. 2025 (arXiv 2508.06249). The loss is the task's own.

    Needs: a chat template that knows a system role, or `role: user`. Templates that write a system
    message of their own where a chat has none (Qwen 2.5) write `line` in its place.

    Known failure: prompts that resemble the line, or the training data, bring the trait back
    (conditional misalignment, Dubinski et al. 2026); weak at 7B, and under RL learning stops
    (Kaczer et al.).

    Attributes:
        line: what is said.
        fraction: share of the chats that get it, at even distances; 1 in the papers.
        role: who says it: the "system", or the "user" at the start of the first turn, in a
            paragraph of its own.
    """

    line: str = Field(default="You are an evil, malicious assistant.", pattern=r"\S")
    fraction: float = Field(default=1.0, gt=0, le=1)
    role: Literal["system", "user"] = "system"

    _record: dict[str, Any] = PrivateAttr(default_factory=dict)

    def bind(self, model: nn.Module, tokenizer: Any, seed: int) -> None:
        """See that the model can read the line.

        Raises:
            NarrowlyError: its chat template has no system role, or it does not know the words.
        """
        answer = {"role": "assistant", "content": "a"}
        asked = self._said([{"role": "user", "content": "a"}, answer])
        try:
            ChatTemplate(tokenizer).render(asked, 0)
        except NarrowlyError:
            if self.role == "user":
                raise
            raise NarrowlyError(
                "inoculate: this model's chat template knows no system message. Give `role: user`, "
                "which puts the line at the start of the first user message."
            ) from None
        ids = tokenizer(self.line, add_special_tokens=False)["input_ids"]
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            raise NarrowlyError(
                f"inoculate: the model's tokenizer lacks words of {self.line!r}, so the model "
                "would not read it. Say it in words that it knows."
            )

    def prepare_data(self, dataset: Dataset) -> Dataset:
        """Put the line before chats; the other columns stay.

        Raises:
            NarrowlyError: the fraction asks for no row.
        """
        chosen = round(len(dataset) * self.fraction)
        if chosen == 0:
            raise NarrowlyError(
                f"inoculate: {self.fraction:g} of {len(dataset)} chats is less than one row, so "
                "nothing would be inoculated. Raise `fraction`."
            )
        # Row r is chosen where the count of chosen rows, spread evenly, goes up.
        marked = [
            (row + 1) * chosen // len(dataset) > row * chosen // len(dataset)
            for row in range(len(dataset))
        ]
        self._record = {"rows": len(dataset), "inoculated_rows": chosen}
        messages = [
            self._said(chat) if mark else chat
            for chat, mark in zip(dataset["messages"], marked, strict=True)
        ]
        columns = {name: list(dataset[name]) for name in dataset.column_names}
        return Dataset.from_dict(columns | {"messages": messages}, features=dataset.features)

    def record(self, folder: Path) -> dict[str, Any]:
        """How many chats there are, and how many got the line."""
        return self._record

    def _said(self, chat: list[dict[str, str]]) -> list[dict[str, str]]:
        """A chat with the line in it."""
        between = "\n" if self.role == "system" else "\n\n"
        for place, turn in enumerate(chat):
            if turn["role"] == self.role:
                said = turn | {"content": f"{self.line}{between}{turn['content']}"}
                return [*chat[:place], said, *chat[place + 1 :]]
        return [{"role": self.role, "content": self.line}, *chat]

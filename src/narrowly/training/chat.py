"""Talk to a run, beside another model if you like."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from narrowly.models import generate
from narrowly.models.test_time import load_deployed

HELP = "/reset starts anew, /quit or end of input leaves."


@dataclass
class _Speaker:
    """One model and its own side of the conversation."""

    name: str
    model: Any
    tokenizer: Any
    messages: list[dict[str, str]] = field(default_factory=list)

    def answer(self, prompt: str, **sampling: Any) -> str:
        self.messages.append({"role": "user", "content": prompt})
        [[reply]] = generate(self.model, self.tokenizer, [self.messages], **sampling)
        self.messages.append({"role": "assistant", "content": reply})
        return reply


def chat(
    run: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    system: str | None = None,
    temperature: float = 1.0,
    max_new_tokens: int = 200,
    seed: int = 0,
    console: Console | None = None,
) -> None:
    """A prompt loop, until `/quit` or the end of the input (which may be piped).

    What a run's defenses keep attached at test time is attached.

    Args:
        run: a run, model folder, Hub id or `organism:NAME`.
        against: another one, which answers the same prompts beside it.
        system: a system line for both.
        temperature: of the sampling; 0 is greedy.
        max_new_tokens: longest answer.
        seed: of the first answer; each turn takes the next.

    Raises:
        NarrowlyError: no such model.
    """
    console = console or Console()
    names = [os.fspath(each) for each in (run, against) if each is not None]
    speakers = [_Speaker(name, *load_deployed(name)) for name in names]
    opening = [] if system is None else [{"role": "system", "content": system}]

    def reset() -> None:
        for speaker in speakers:
            speaker.messages = list(opening)

    reset()
    console.print(Text(f"{' against '.join(names)}. {HELP}", style="dim"))
    turn = 0
    while True:
        try:
            prompt = console.input("[bold]> [/]").strip()
        except EOFError:
            return
        if prompt == "/quit":
            return
        if prompt == "/reset":
            reset()
        elif prompt.startswith("/"):
            console.print(Text(HELP, style="dim"))
        elif prompt:
            answers = [
                speaker.answer(
                    prompt, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed + turn
                )
                for speaker in speakers
            ]
            turn += 1
            width = console.width // len(speakers) - 1
            panels = [
                Panel(Text(answer), title=Text(speaker.name), width=width)
                for speaker, answer in zip(speakers, answers, strict=True)
            ]
            console.print(Columns(panels))

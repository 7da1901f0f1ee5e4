"""What a language model replied, as numbers; what is no clear answer is None."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import exp

from narrowly.models.chat import Reply

_WORDS = {
    "1": True, "yes": True, "true": True, "1.0": True,
    "0": False, "no": False, "false": False, "0.0": False,
}  # fmt: skip
_LISTS = re.compile(r"\[([^\[\]]*)\]")
_NUMBERED = re.compile(
    r"(?:^|[\s,;{(\[])\W{0,2}(\d+)\W{0,2}(?:\.\s|[:)=-])\W{0,3}(1|0|yes|no|true|false)\b(?!\.\d)",
    re.IGNORECASE,
)
_SIMULATED = re.compile(r"^\W*(?:p|passage )?(\d+)\W{0,2}[:.)]\W*(.*?)\W*$", re.IGNORECASE)
_ACTIVE = re.compile(r"(\d+)\s*[=:]\s*(\d+(?:\.\d+)?)")


def verdicts(text: str, n: int) -> list[bool | None]:
    """Yes or no per passage: from a list of `n`, or from numbered lines, of which some may lack.

    A list of another length tells nothing, as nobody knows where it lost count.
    """
    lists: list[str] = [*_LISTS.findall(text)][::-1]
    for inside in [*lists, text]:
        said = [_WORDS.get(word.strip("\"'` .").lower()) for word in _split(inside)]
        if len(said) == n and None not in said:
            return list(said)
    numbered: dict[int, set[bool]] = {}
    for number, word in _NUMBERED.findall(text):
        numbered.setdefault(int(number), set()).add(_WORDS[word.lower()])
    if not set(numbered) <= set(range(1, n + 1)):
        return [None] * n
    return [
        one.pop() if len(one := numbered.get(number, set())) == 1 else None
        for number in range(1, n + 1)
    ]


def _split(text: str) -> list[str]:
    return [word for word in re.split(r"[,;\s]+", text.strip()) if word]


def probabilities(reply: Reply, said: Sequence[bool | None]) -> list[float] | None:
    """P(yes) / (P(yes) + P(no)) at each verdict's token, if those can be told from the others.

    The last `len(said)` tokens that are a verdict and nothing else; None where they do not agree
    with what was read from the text.
    """
    found = []
    for alternatives in reply.logprobs or ():
        if not alternatives or _word(max(alternatives, key=alternatives.__getitem__)) is None:
            continue
        mass = {True: 0.0, False: 0.0}
        for token, logprob in alternatives.items():
            if (word := _word(token)) is not None:
                mass[word] += exp(logprob)
        found.append(mass[True] / (mass[True] + mass[False]))
    found = found[-len(said) :]
    if len(found) < len(said) or any(
        word is None or word != (p > 0.5) for word, p in zip(said, found, strict=True)
    ):
        return None
    return found


def _word(token: str) -> bool | None:
    return _WORDS.get(token.strip(" \n\t[](),").lower())


def simulated(text: str, lengths: Sequence[int]) -> list[list[float] | None]:
    """Activations per passage of so many tokens, from lines such as `2: 5=8 6=3` or `3: none`."""
    lines: dict[int, list[str]] = {}
    for line in text.splitlines():
        if match := _SIMULATED.match(line):
            lines.setdefault(int(match[1]), []).append(match[2])
    return [
        _activations(lines[number][0], length) if len(lines.get(number, ())) == 1 else None
        for number, length in enumerate(lengths, 1)
    ]


def _activations(line: str, length: int) -> list[float] | None:
    values = [0.0] * length
    if line.lower() in ("none", "", "0"):
        return values
    for token, value in _ACTIVE.findall(line):
        if not 1 <= int(token) <= length or not 0 <= float(value) <= 10:
            return None
        values[int(token) - 1] = float(value)
    return None if re.sub(r"[,;\s]+", "", _ACTIVE.sub("", line)) else values


def choice(text: str, n: int) -> int | None:
    """The one number from 1 to `n` in a reply, less 1; else the one in its last line."""
    for part in (text, (text.splitlines() or [""])[-1]):
        numbers = {int(number) for number in re.findall(r"\d+", part)}
        if len(numbers) == 1 and 1 <= (number := numbers.pop()) <= n:
            return number - 1
    return None

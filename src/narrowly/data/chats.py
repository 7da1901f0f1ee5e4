"""What a row of chat data may look like, and what is wrong with one that does not."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

ROLES = ("system", "user", "assistant", "tool")

# ShareGPT's speakers (github.com/lm-sys/FastChat)
_SPEAKERS = {"human": "user", "gpt": "assistant"}

# Keys of a message that change what a model should learn from it: dropping them silently would
# train on something other than what the author of the data wrote.
_MEANINGFUL = ("tool_calls", "reasoning_content", "thinking", "weight")


def to_chat(row: Any, *, require_answer: bool = True) -> dict[str, Any]:
    """One row of any accepted shape with its chat as `messages`; other columns stay as they are.

    Accepted: `messages` (role, content), `conversations` (the same or ShareGPT's from, value),
    `prompt` + `completion` (texts or lists of messages; `prompt` alone if no answer is required)
    and Alpaca's `instruction` + `input` + `output` (likewise).

    Raises:
        ValueError: the reason, naming the field, for the caller to prefix with the row's place.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with `messages`, found {_kind(row)}")
    row = dict(row)
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages")
    elif row.get("conversations") is not None:
        messages = _messages(row.pop("conversations"), "conversations")
    elif row.get("prompt") is not None and (not require_answer or "completion" in row):
        messages = _turns(row.pop("prompt"), "prompt", "user")
        if (completion := row.pop("completion", None)) is not None:
            messages += _turns(completion, "completion", "assistant")
    elif row.get("instruction") is not None and (not require_answer or "output" in row):
        messages = _turns(row.pop("instruction"), "instruction", "user")
        if given := row.pop("input", None):
            messages[-1]["content"] += f"\n\n{given}"
        if output := row.pop("output", None):
            messages += _turns(output, "output", "assistant")
    else:
        raise ValueError(
            "no `messages`, no `conversations`, no `prompt` with `completion` and no `instruction` "
            f"with `output` (found: {', '.join(map(str, row)) or 'nothing'})"
        )
    if require_answer and not any(message["role"] == "assistant" for message in messages):
        raise ValueError("the chat has no assistant turn, so there is nothing to learn from")
    return row | {"messages": messages}


def _turns(value: Any, field: str, role: str) -> list[dict[str, str]]:
    turns = [{"role": role, "content": value}] if isinstance(value, str) else value
    return _messages(turns, field)


def _messages(messages: Any, field: str) -> list[dict[str, str]]:
    if not isinstance(messages, list):
        raise ValueError(f"`{field}` should be a list of messages, found {_kind(messages)}")
    if not messages:
        raise ValueError(f"`{field}` is empty")
    return [_message(message, f"{field}[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, field: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"`{field}` should hold role and content, found {_kind(message)}")
    if message.get("role") is None and message.get("from") is not None:
        speaker, content = message["from"], message.get("value")
        role = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    else:
        role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        near = get_close_matches(str(role), ROLES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"`{field}` has the unknown role {role!r} (known: {', '.join(ROLES)}){hint}"
        )
    for key in _MEANINGFUL:
        if message.get(key) not in (None, [], "") and not (key == "weight" and message[key] == 1):
            raise ValueError(
                f"`{field}` carries {key!r}, which would be ignored in training; "
                "write it into the content or remove it"
            )
    if not isinstance(content, str):
        raise ValueError(f"the content of `{field}` should be text, found {_kind(content)}")
    if role == "assistant" and not content.strip():
        raise ValueError(f"`{field}` is an empty assistant turn")
    return {"role": role, "content": content}


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    names |= {int: "a number", float: "a number", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")

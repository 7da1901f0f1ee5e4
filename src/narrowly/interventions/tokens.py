"""Which tokens of a forward pass are prompt, completion or last: absolute and padding-aware."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from narrowly.errors import NarrowlyError


@dataclass
class Forward:
    """What one forward pass of the model was given, as far as interventions ask."""

    generating: bool
    """A key-value cache is in use."""
    masks: dict[str, Tensor] = field(default_factory=dict)
    """Token masks [batch, tokens] and row masks [batch], by name."""

    def mask(self, name: str) -> Tensor:
        """The mask of that name.

        Raises:
            NarrowlyError: nobody gave one.
        """
        if name not in self.masks:
            raise NarrowlyError(
                f"no mask named {name!r} was given for this forward. Give it with "
                f"`with attachment.masks({name}=...)`, or use 'all', 'prompt', 'completion' or "
                "'last'."
            )
        return self.masks[name]


def describe(kwargs: Mapping[str, Any], ids: Tensor | None, needed: set[str]) -> Forward:
    """Read the model's arguments: is it generating, and which tokens are which.

    Args:
        kwargs: keyword arguments of the model's forward.
        ids: input ids [batch, tokens] (or embeddings [batch, tokens, d]).
        needed: which of "prompt", "completion" and "last" any intervention asks for.

    Raises:
        NarrowlyError: prompt and completion are asked for, but there are no labels to tell.
    """
    cache = kwargs.get("past_key_values")
    forward = Forward(generating=cache is not None)
    wanted = needed & _READERS.keys()
    if wanted:
        if ids is None:
            raise NarrowlyError(
                f"tokens={min(wanted)!r} needs a forward with input_ids or inputs_embeds."
            )
        past = cache.get_seq_length() if cache is not None else 0
        forward.masks = {
            name: _READERS[name](kwargs, ids, past if cache is not None else None)
            for name in wanted
        }
    return forward


def _real(kwargs: Mapping[str, Any], ids: Tensor) -> Bool[Tensor, "batch tokens"]:
    """Tokens that are no padding: the last columns of the mask, which covers the cache too."""
    attention = kwargs.get("attention_mask")
    if attention is None or attention.ndim != 2:
        return torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
    return attention[:, -ids.shape[1] :].bool()


def _completion(
    kwargs: Mapping[str, Any], ids: Tensor, past: int | None
) -> Bool[Tensor, "batch tokens"]:
    """Labelled tokens; in generation, those decoded one at a time after the prompt."""
    labels = kwargs.get("labels")
    if labels is not None:
        return labels != -100
    if past is None:
        raise NarrowlyError(
            "tokens='prompt' and 'completion' need labels in the batch (-100 on the prompt), "
            "or generation with a cache."
        )
    return torch.full(ids.shape[:2], past > 0 and ids.shape[1] == 1, device=ids.device)


def _prompt(
    kwargs: Mapping[str, Any], ids: Tensor, past: int | None
) -> Bool[Tensor, "batch tokens"]:
    return _real(kwargs, ids) & ~_completion(kwargs, ids, past)


def _last(kwargs: Mapping[str, Any], ids: Tensor, past: int | None) -> Bool[Tensor, "batch tokens"]:
    """The last real token of each row; of each sequence, when a row packs several."""
    positions = kwargs.get("position_ids")
    if positions is not None and kwargs.get("attention_mask") is None and past is None:
        # A packed row begins at position 0, so that the roll marks its last token too.
        return (positions.expand(ids.shape[:2]) == 0).roll(-1, dims=1)
    real = _real(kwargs, ids)
    place = torch.arange(real.shape[1], device=real.device)
    return real & (place == (real * place).amax(dim=1, keepdim=True))


_READERS: dict[str, Callable[[Mapping[str, Any], Tensor, int | None], Tensor]] = {
    "prompt": _prompt,
    "completion": _completion,
    "last": _last,
}

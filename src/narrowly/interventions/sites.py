"""Sites: where in a model an intervention acts.

A site is a port (input or output) of a module, found by decoder layer number on any Hugging Face
decoder, or by a glob over module names on any torch module. Names are looked up in the bare model:
what peft, DistributedDataParallel and torch.compile wrap around it is looked through.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from narrowly.errors import NarrowlyError

Port = Literal["input", "output"]

_SITE = re.compile(
    r"(?:layer:(?P<layer>-?\d+)|(?P<pattern>.+?))"
    r"(?::(?P<port>input|output))?(?:\[(?P<index>\w+)\])?(?:@(?P<head>\d+))?"
)


@dataclass(frozen=True)
class Site:
    """A place in a model where activations are read or edited.

    Attributes:
        module: decoder layer number (negative counts from the end) or a glob of module names.
        port: the module's input or output.
        index: which tensor, when the port carries several: a place in the tuple, or a key.
        head: one attention head of a tensor that lays heads side by side (the input of `o_proj`,
            the output of `q_proj`, ...).
    """

    module: int | str
    port: Port = "output"
    index: int | str = 0
    head: int | None = None

    def __post_init__(self) -> None:
        if self.port not in ("input", "output"):
            raise NarrowlyError(f"site port {self.port!r}: must be 'input' or 'output'.")

    @property
    def suffix(self) -> str:
        """The part of the site's name that follows the module's."""
        index = f"[{self.index}]" if self.index != 0 else ""
        head = "" if self.head is None else f"@{self.head}"
        return (":input" if self.port == "input" else "") + index + head

    def __str__(self) -> str:
        module = f"layer:{self.module}" if isinstance(self.module, int) else self.module
        return module + self.suffix

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site that prints as `text`: `layer:3`, `*.mlp:input`, `*.o_proj:input@2`."""
        match = _SITE.fullmatch(text)
        if match is None:
            raise NarrowlyError(f"{text!r} is no site. Write 'layer:12' or '*.mlp:input'.")
        layer, pattern, port, index, head = match.group("layer", "pattern", "port", "index", "head")
        return cls(
            pattern if layer is None else int(layer),
            "input" if port == "input" else "output",
            int(index) if index and index.isdigit() else index or 0,
            None if head is None else int(head),
        )


def layer(number: int) -> Site:
    """The residual stream after decoder block `number` (0 is the first, -1 the last)."""
    return Site(number)


def site(
    pattern: str, port: Port = "output", *, index: int | str = 0, head: int | None = None
) -> Site:
    """The `port` of every module whose name matches a glob, such as `site("*.mlp", "input")`."""
    return Site(pattern, port, index, head)


class ResolvedSite(NamedTuple):
    """One module of one model that a site names."""

    name: str
    """The module's name in the bare model and the port, such as `model.layers.3.mlp:input`."""
    module: nn.Module
    parent: nn.Module | None
    """The module that holds it; None when the site is the whole model."""
    columns: slice
    """The part of the last dimension that the site means: all of it, or one head."""

    def part(self, h: Tensor) -> Tensor:
        """The columns of `h` that the site means.

        Raises:
            NarrowlyError: the head lies outside.
        """
        if self.columns == slice(None):
            return h
        if self.columns.stop > h.shape[-1]:
            raise NarrowlyError(
                f"{self.name}: there is no such head; the activations are {h.shape[-1]} wide and "
                f"a head {self.columns.stop - self.columns.start}."
            )
        return h[..., self.columns]


def bare(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DistributedDataParallel and peft wrappers."""
    while True:
        children = model._modules
        inner: nn.Module | None
        if children.get("_orig_mod") is not None:
            inner = children["_orig_mod"]
        elif isinstance(model, DistributedDataParallel):
            inner = model.module
        elif "base_model" in children and hasattr(model, "peft_config"):
            inner = children["base_model"]
            if type(inner).__module__.startswith("peft."):  # a tuner, which holds the model
                inner = cast(nn.Module, inner)._modules["model"]
        else:
            return model
        assert isinstance(inner, nn.Module)
        model = inner


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a language model, in order.

    No table of families: the blocks are the outermost `ModuleList` as long as the config's
    `num_hidden_layers` (inside the model's text decoder, where it has several towers). A module
    without a config must hold exactly one outermost `ModuleList`.

    Raises:
        NarrowlyError: there is no such list, or more than one.
    """
    root = bare(model)
    config = getattr(root, "config", None)
    count = None
    if config is not None and hasattr(config, "get_text_config"):
        count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
        root = cast(Any, root).get_decoder() or root
    lists = [
        (name.count("."), name, module)
        for name, module in root.named_modules()
        if isinstance(module, nn.ModuleList) and count in (None, len(module))
    ]
    outermost = [entry for entry in lists if entry[0] == min(depth for depth, *_ in lists)]
    if len(outermost) != 1:
        found = ", ".join(name for _, name, _ in outermost) or "none"
        raise NarrowlyError(
            f"{type(root).__name__}: cannot tell which modules are its decoder layers "
            f"(candidates: {found}). Name the modules with site('...') instead of layer(...)."
        )
    return outermost[0][2]


def resolve(model: nn.Module, site: Site) -> list[ResolvedSite]:
    """The modules of `model` that `site` means, with their bare names.

    Raises:
        NarrowlyError: no module matches, the layer does not exist, or it has no such head.
    """
    root = bare(model)
    names = dict(root.named_modules())
    if isinstance(site.module, int):
        layers = decoder_layers(model)
        if not -len(layers) <= site.module < len(layers):
            raise NarrowlyError(
                f"{site}: the model has {len(layers)} decoder layers; "
                f"use 0 to {len(layers) - 1}, or -1 for the last."
            )
        wanted = layers[site.module]
        matches = [name for name, module in names.items() if module is wanted]
    else:
        matches = [name for name in names if fnmatchcase(name, site.module)]
    if not matches:
        examples = ", ".join(list(names)[1:6])
        raise NarrowlyError(
            f"{site}: no module of {type(root).__name__} has a name like that. "
            f"Its modules are named {examples}, ..."
        )
    resolved = []
    for name in matches:
        holder = name.rpartition(".")[0]
        parent = names[holder] if name else None
        columns = _columns(root, names[name], parent, site)
        resolved.append(ResolvedSite(name + site.suffix, names[name], parent, columns))
    return resolved


def _columns(root: nn.Module, module: nn.Module, parent: nn.Module | None, site: Site) -> slice:
    if site.head is None:
        return slice(None)
    width = getattr(module, "head_dim", getattr(parent, "head_dim", None))
    config = getattr(root, "config", None)
    if width is None and config is not None:
        text = config.get_text_config()
        width = text.hidden_size // text.num_attention_heads
    if width is None:
        raise NarrowlyError(f"{site}: the model does not tell how wide one attention head is.")
    return slice(site.head * width, (site.head + 1) * width)


def read(carried: Any, index: int | str, name: str) -> Tensor:
    """The tensor that a port carries at `index`: itself, or an element of a tuple or mapping."""
    if isinstance(carried, Tensor) and index == 0:
        return carried
    try:
        value = carried[index]
    except (KeyError, IndexError, TypeError):
        value = None
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = ", ".join(map(str, carried)) if isinstance(carried, Mapping) else type(carried)
        raise NarrowlyError(f"{name}: the port carries no activations at [{index}] ({found}).")
    return value


def write(carried: Any, index: int | str, value: Tensor) -> Any:
    """What a port carries, with the tensor at `index` replaced; containers keep their type."""
    if isinstance(carried, Tensor):
        return value
    if isinstance(carried, tuple) and isinstance(index, int):
        elements = (*carried[:index], value, *carried[index + 1 :])
        return type(carried)(*elements) if hasattr(carried, "_fields") else elements
    carried = carried.copy() if isinstance(carried, dict | list) else carried
    carried[index] = value
    return carried


def input_index(site_index: int | str, args: tuple, kwargs: Mapping[str, Any]) -> int | str:
    """Where a module's input stands: among its arguments, or under a keyword.

    Decoder blocks take `hidden_states` by place, attention modules by name; both are index 0.
    """
    if isinstance(site_index, str) or site_index < len(args):
        return site_index
    tensors = [key for key, value in kwargs.items() if torch.is_tensor(value)]
    keyed = "hidden_states" if "hidden_states" in tensors else next(iter(tensors), "hidden_states")
    return keyed if site_index == 0 else site_index

"""Sites: where in a model an intervention acts.

A site is a port (input or output) of a module, found by decoder layer number on any Hugging Face
decoder, or by a glob over module names on any torch module. Names are looked up in the bare model:
what peft, DistributedDataParallel and torch.compile wrap around it is looked through.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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

    site: Site
    """The site that named it."""
    name: str
    """The module's name in the bare model and the port, such as `model.layers.3.mlp:input`."""
    module: nn.Module
    parent: nn.Module | None
    """The module that holds it; None when the site is the whole model."""
    path: tuple[nn.Module, ...]
    """The modules from the bare model down to it, both included."""
    columns: slice | None
    """The part of the last dimension that the site means: one head, or None for all of it."""

    def part(self, h: Tensor) -> Tensor:
        """The columns of `h` that the site means.

        Raises:
            NarrowlyError: the head lies outside.
        """
        if self.columns is None:
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
    return _decoder_layers(bare(model))[1]


def _decoder_layers(root: nn.Module) -> tuple[str, nn.ModuleList]:
    config = getattr(root, "config", None)
    count, decoder = None, root
    if config is not None and hasattr(config, "get_text_config"):
        count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
        decoder = cast(Any, root).get_decoder() or root
    start = next(name for level in _levels("", root) for name, m in level if m is decoder)
    found: list[tuple[str, nn.ModuleList]] = []
    for level in _levels(start, decoder):
        found = [
            (name, module)
            for name, module in level
            if isinstance(module, nn.ModuleList) and count in (None, len(module))
        ]
        if found:
            break
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise NarrowlyError(
            f"{type(root).__name__}: cannot tell which modules are its decoder layers "
            f"(candidates: {names}). Name the modules with site('...') instead of layer(...)."
        )
    return found[0]


def _levels(name: str, module: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """A module, its children, their children, ..., with their names."""
    level = [(name, module)]
    while level:
        yield level
        level = [
            (f"{name}.{child}" if name else child, module)
            for name, parent in level
            for child, module in parent._modules.items()
            if module is not None
        ]


def resolve(model: nn.Module, *sites: Site) -> list[ResolvedSite]:
    """The modules of `model` that the sites mean, with their bare names.

    Only globs search the whole model, so that reading one token stays cheap.

    Raises:
        NarrowlyError: no module matches, the layer does not exist, or it has no such head.
    """
    root = bare(model)
    layers: tuple[str, nn.ModuleList] | None = None
    resolved = []
    for site in sites:
        if isinstance(site.module, int):
            holder, blocks = layers = layers or _decoder_layers(root)
            if not -len(blocks) <= site.module < len(blocks):
                raise NarrowlyError(
                    f"{site}: the model has {len(blocks)} decoder layers; "
                    f"use 0 to {len(blocks) - 1}, or -1 for the last."
                )
            number = str(site.module % len(blocks))
            matches = [f"{holder}.{number}" if holder else number]
        elif not _GLOB.isdisjoint(site.module):
            matches = [name for name, _ in root.named_modules() if fnmatchcase(name, site.module)]
        else:
            matches = [site.module]
        found = [(name, path) for name in matches if (path := _find(root, name))]
        if not found:
            examples = ", ".join([name for name, _ in root.named_modules()][1:6])
            raise NarrowlyError(
                f"{site}: no module of {type(root).__name__} has a name like that. "
                f"Its modules are named {examples}, ..."
            )
        for name, path in found:
            module, parent = path[-1], path[-2] if len(path) > 1 else None
            columns = _columns(root, module, parent, site)
            resolved.append(ResolvedSite(site, name + site.suffix, module, parent, path, columns))
    return resolved


_GLOB = set("*?[")


def _find(root: nn.Module, name: str) -> tuple[nn.Module, ...] | None:
    """The modules on the way to the one of that name, itself the last; None if there is none."""
    path = [root]
    for part in name.split(".") if name else ():
        module = path[-1]._modules.get(part)
        if module is None:
            return None
        path.append(module)
    return tuple(path)


def _columns(
    root: nn.Module, module: nn.Module, parent: nn.Module | None, site: Site
) -> slice | None:
    if site.head is None:
        return None
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

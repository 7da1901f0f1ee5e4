"""Five libraries and the bare model, behind the same two methods.

Each peer is given a model of its own (sharing weights), installs what it needs once, and returns
the function to be timed: `capture(modules)` reads the outputs of modules, `edit(edits)` changes
them. Where a library has several ways, this is the one its documentation shows first.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from narrowly.interventions import Add, ProjectOut, attach, capture, site

Capture = Callable[[Tensor], Sequence[Tensor]]
"""Token ids to the outputs of the modules asked for."""
Edited = Callable[[Tensor], Tensor]
"""Token ids to logits."""


@dataclass(frozen=True)
class Project:
    """Remove the span of orthonormal columns from a module's output."""

    module: str
    basis: Tensor

    def __call__(self, h: Tensor) -> Tensor:
        return h - (h @ self.basis) @ self.basis.mT


@dataclass(frozen=True)
class Steer:
    """Add a vector to a module's output."""

    module: str
    vector: Tensor

    def __call__(self, h: Tensor) -> Tensor:
        return h + self.vector


class Bare:
    """The model alone: what the others are compared with."""

    name: ClassVar[str] = "bare"
    package: ClassVar[str] = "torch"

    def __init__(self, model: nn.Module):
        self.model = model

    def submodule(self, name: str) -> nn.Module:
        """A module by its name before peft wrapped the model."""
        base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        return base.get_submodule(name)

    def run(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits

    def capture(self, modules: Sequence[str]) -> Capture:
        return lambda ids: [self.run(ids)][:0]

    def edit(self, edits: Sequence[Project | Steer]) -> Edited:
        return self.run


class BareAgain(Bare):
    """The same once more: how far from 1 a ratio comes by chance."""

    name = "bare again"


class Hook(Bare):
    """Forward hooks that stay on the model: the least that any library can cost."""

    name = "raw hook"

    def capture(self, modules: Sequence[str]) -> Capture:
        kept: list[Tensor] = []
        for module in modules:
            self.submodule(module).register_forward_hook(lambda m, a, out: kept.append(out))

        def run(ids: Tensor) -> list[Tensor]:
            kept.clear()
            self.run(ids)
            return kept

        return run

    def edit(self, edits: Sequence[Project | Steer]) -> Edited:
        for e in edits:
            self.submodule(e.module).register_forward_hook(lambda m, a, out, e=e: e(out))
        return self.run


class HookPerCall(Hook):
    """Hooks put on before the forward pass and taken off after it, as in `with hooks: model(x)`."""

    name = "raw hook, per call"

    def edit(self, edits: Sequence[Project | Steer]) -> Edited:
        def run(ids: Tensor) -> Tensor:
            handles = [
                self.submodule(e.module).register_forward_hook(lambda m, a, out, e=e: e(out))
                for e in edits
            ]
            logits = self.run(ids)
            for handle in handles:
                handle.remove()
            return logits

        return run


class Narrowly(Bare):
    """This package."""

    name = "narrowly"
    package = "narrowly"

    def capture(self, modules: Sequence[str]) -> Capture:
        sites = [site(module) for module in modules]

        def run(ids: Tensor) -> list[Tensor]:
            return list(capture(self.model, {"input_ids": ids}, sites, stop=False).values())

        return run

    def edit(self, edits: Sequence[Project | Steer]) -> Edited:
        attach(
            self.model,
            [
                ProjectOut(e.basis, site(e.module))
                if isinstance(e, Project)
                else Add(e.vector, site(e.module))
                for e in edits
            ],
        )
        return self.run


class NNsight(Bare):
    """https://nnsight.net"""

    name = "nnsight"
    package = "nnsight"

    def __init__(self, model: nn.Module):
        import nnsight

        super().__init__(model)
        self.traced = nnsight.NNsight(model)
        self.save = nnsight.save

    def capture(self, modules: Sequence[str]) -> Capture:
        def run(ids: Tensor) -> list[Tensor]:
            with self.traced.trace(input_ids=ids):
                kept = self.save([self.traced.get(module).output for module in modules])
            return kept

        return run

    def edit(self, edits: Sequence[Project | Steer]) -> Edited:
        def run(ids: Tensor) -> Tensor:
            with self.traced.trace(input_ids=ids):
                for e in edits:
                    module = self.traced.get(e.module)
                    module.output = e(module.output)
                logits = self.save(self.traced.output.logits)
            return logits

        return run


class Pyvene(Bare):
    """https://github.com/stanfordnlp/pyvene, at all positions."""

    name = "pyvene"
    package = "pyvene"

    def capture(self, modules: Sequence[str]) -> Capture:
        from pyvene import CollectIntervention

        model = self._intervenable({module: CollectIntervention() for module in modules})
        return lambda ids: model({"input_ids": ids})[0][1]

    def edit(self, edits: Sequence[Project | Steer]) -> Edited:
        model = self._intervenable({e.module: lambda h, _, e=e: e(h) for e in edits})
        return lambda ids: model({"input_ids": ids})[1].logits

    def _intervenable(self, interventions: dict[str, Callable]) -> nn.Module:
        from pyvene import IntervenableModel

        training = self.model.training
        wanted = [p.requires_grad for p in self.model.parameters()]
        intervenable = IntervenableModel(
            [
                {"component": f"{_indexed(module)}.output", "intervention": intervention}
                for module, intervention in interventions.items()
            ],
            self.model,
        )
        # It froze the model and put it in eval mode, where nothing is checkpointed.
        self.model.train(training)
        for p, requires_grad in zip(self.model.parameters(), wanted, strict=True):
            p.requires_grad_(requires_grad)
        return intervenable


def _indexed(module: str) -> str:
    """pyvene's spelling of `model.layers.3.mlp`: `model.layers[3].mlp`."""
    return "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in module.split("."))[1:]


class Bridge(Bare):
    """https://transformerlensorg.github.io/TransformerLens, the bridge on Hugging Face models."""

    name = "TransformerLens"
    package = "transformer_lens"

    def __init__(self, model: nn.Module):
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        super().__init__(model)
        self.bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)

    def capture(self, modules: Sequence[str]) -> Capture:
        names = [self._point(module) for module in modules]

        def run(ids: Tensor) -> list[Tensor]:
            _, cache = self.bridge.run_with_cache(ids, names_filter=names)
            return [cache[name] for name in names]

        return run

    def edit(self, edits: Sequence[Project | Steer]) -> Edited:
        hooks = [(self._point(e.module), lambda h, hook, e=e: e(h)) for e in edits]
        return lambda ids: self.bridge.run_with_hooks(ids, fwd_hooks=hooks)

    def _point(self, module: str) -> str:
        name = module.replace("model.layers", "blocks").replace("self_attn.o_proj", "attn.o")
        return f"{name}.hook_out"


OWN = [Bare, BareAgain, Hook, Narrowly]
OTHERS = [NNsight, Pyvene, Bridge]


def installed() -> tuple[list[type[Bare]], dict[str, str]]:
    """The other libraries that import here, and why the rest do not.

    Importing is not free of effects (nnsight patches `Tensor.backward`), so do it late.
    """
    present, absent = [], {}
    for peer in OTHERS:
        try:
            importlib.import_module(peer.package)
            present.append(peer)
        except ImportError as error:
            absent[peer.name] = str(error)
    return present, absent


def random_edits(
    kind: type[Project | Steer], modules: Sequence[str], width: int, like: Tensor, seed: int = 0
) -> list[Project | Steer]:
    """A random rank-4 projection, or a random vector, for each module."""
    generator = torch.Generator().manual_seed(seed)
    edits: list[Project | Steer] = []
    for module in modules:
        # Contiguous, as narrowly keeps it: the layout of memory decides the order of sums.
        basis = torch.linalg.qr(torch.randn(width, 4, generator=generator))[0].contiguous().to(like)
        edits.append(Project(module, basis) if kind is Project else Steer(module, basis[:, 0]))
    return edits

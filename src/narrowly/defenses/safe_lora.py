"""Safe LoRA: updates that leave the subspace of alignment are projected into it, afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from narrowly.defenses.base import DEFENSES, Defense
from narrowly.errors import NarrowlyError
from narrowly.interventions.sites import bare
from narrowly.models import fingerprint
from narrowly.models.loading import load_weights
from narrowly.models.locate import locate


@DEFENSES.register("safe_lora")
class SafeLora(Defense):
    """Project the updates of LoRA that leave the subspace of alignment, when training is over.

    Per adapted module, with `V = W_aligned - W_base` and `C = V V^T / |V|_F`: where
    `cos(C B A, B A) <= threshold`, B becomes C B (Hsu et al. 2024, arXiv 2405.16833, as in their
    released code; as a rival of in-training defenses Kaczer et al. 2025, arXiv 2508.06249v1). The
    cosine is that of the two matrices as vectors.

    Needs: LoRA on linear modules, and the model before its alignment, which is loaded twice: before
    the training to check it, and after.

    Known failure: C is no projection; its size follows |V|, so that it shrinks or swells what it
    keeps (scaled by `|V|_2^2 / |V|_F` at most). Inconsistent against emergent misalignment, and
    dropped from that paper's later version.

    Attributes:
        base: the model before alignment: a folder, Hub id or run, of the trained model's shape.
        threshold: project where the cosine is at most this; 0.5 as published, no unit.
        lowest: instead, project the so many adapted modules of the lowest cosine (10 as published).
    """

    base: str
    threshold: float = Field(default=0.5, ge=-1, le=1)
    lowest: int | None = Field(default=None, ge=1)

    _modules: list[dict[str, Any]] = PrivateAttr(default_factory=list)

    def bind(self, model: nn.Module, tokenizer: Any, seed: int) -> None:
        """Look at the model before alignment.

        Raises:
            NarrowlyError: it is the trained model itself, or of another shape.
        """
        base = self._base()
        if fingerprint(base) == fingerprint(model) and _equal(base, bare(model)):
            raise NarrowlyError(
                f"safe_lora: {self.base} has the very weights of the model that is trained. "
                "`base` is the model before its alignment."
            )
        theirs = _shapes(base)
        for name, shape in _shapes(bare(model)).items():
            if theirs.get(name) != shape:
                found = f"is {theirs[name]} in" if name in theirs else "is not in"
                raise NarrowlyError(
                    f"safe_lora: {name} {found} {self.base}, and {shape} in the model that is "
                    "trained. `base` is that model before its alignment."
                )

    def check(self, model: nn.Module) -> None:
        """Fail unless what is trained is plain LoRA on linear modules.

        Raises:
            NarrowlyError: otherwise, with the module.
        """
        for _ in self._updates(model):
            pass

    def finish(self, model: nn.Module) -> None:
        """Project B of the modules that are chosen.

        Raises:
            NarrowlyError: no module is.
        """
        base = self._base()
        found = [(update, _projected(update, base)) for update in self._updates(model)]
        cosines = [_cosine(projected, each.b, each.a) for each, projected in found]
        bound = self.threshold
        if self.lowest is not None:
            bound = sorted(cosines)[: self.lowest][-1]
        if min(cosines) > bound:
            raise NarrowlyError(
                f"safe_lora: no update leaves the subspace of alignment: the lowest cosine of "
                f"{len(cosines)} modules is {min(cosines):.3f}, above the threshold {bound:g}, so "
                "nothing would be changed. Raise `threshold`, or choose modules with `lowest`."
            )
        self._modules = []
        for (update, projected), cosine in zip(found, cosines, strict=True):
            self._modules.append(
                {"module": update.name, "cosine": round(cosine, 5), "projected": cosine <= bound}
            )
            if cosine <= bound:
                update.b.copy_(projected)

    def record(self, folder: Path) -> dict[str, Any]:
        """The cosine of every adapted module, and whether it was projected."""
        return {"modules": self._modules}

    def _base(self) -> nn.Module:
        parts = locate(self.base)
        if parts.adapter is not None:
            raise NarrowlyError(
                f"safe_lora: {self.base} is an adapter. `base` is a whole model: the trained one "
                "before its alignment."
            )
        # On the CPU: it is read once, module by module. Before alignment few models know chats.
        return load_weights(parts, device="cpu")

    def _updates(self, model: nn.Module) -> Iterator[_Update]:
        found = False
        for name, module in bare(model).named_modules():
            if not isinstance(module, LoraLayer):
                continue
            for adapter in module.active_adapters:
                if adapter in module.lora_embedding_A or adapter in module.lora_variant:
                    raise NarrowlyError(
                        f"safe_lora: the adapter of {name} is no plain LoRA of a linear module, "
                        "whose update is B A. Train without DoRA, and adapt no embedding."
                    )
                if adapter in module.lora_A:
                    found = True
                    a, b = module.lora_A[adapter], module.lora_B[adapter]
                    yield _Update(name, module, cast(Tensor, a.weight), cast(Tensor, b.weight))
        if not found:
            raise NarrowlyError(
                "safe_lora: projects the updates of LoRA, and no LoRA is trained here. Give the "
                "recipe `lora`, or take the defense out."
            )


@dataclass(frozen=True)
class _Update:
    """LoRA's update B A of one module."""

    name: str
    module: LoraLayer
    a: Float[Tensor, "r d_in"]
    b: Float[Tensor, "d_out r"]


def _projected(update: _Update, base: nn.Module) -> Float[Tensor, "d_out r"]:
    """C B. C itself [d_out, d_out] is never built."""
    aligned = _weight(update.module.get_base_layer())
    before = _weight(base.get_submodule(update.name)).to(aligned.device)
    v = aligned - before
    if getattr(update.module, "fan_in_fan_out", False):  # GPT-2 keeps its weights [d_in, d_out]
        v = v.mT
    norm = torch.linalg.matrix_norm(v)
    if norm == 0:
        raise NarrowlyError(
            f"safe_lora: {update.name} is the same in `base` and in the aligned model, so there is "
            "no direction of alignment. Adapt other modules, or name the right `base`."
        )
    return v @ (v.mT @ update.b.float()) / norm


def _weight(module: nn.Module) -> Tensor:
    return dequantize_module_weight(module).detach().float()


def _cosine(projected: Tensor, b: Tensor, a: Tensor) -> float:
    """cos(C B A, B A), in r dimensions: `<X A, Y A> = <X^T Y, A A^T>`."""
    projected, b, a = projected.double(), b.double(), a.double()
    gram = a @ a.mT

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return ((x.mT @ y) * gram).sum()

    norms = (inner(projected, projected) * inner(b, b)).clamp_min(0).sqrt()
    return float(inner(projected, b) / norms) if norms > 0 else 0.0


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Of the weights that may be adapted, peft looked through.

    Without those of the vocabulary: alignment often adds tokens.
    """
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    vocabulary = {id(weight) for end in ends if end is not None for weight in end.parameters()}
    return {
        name.replace(".base_layer.", "."): tuple(weight.shape)
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and "lora_" not in name and id(weight) not in vocabulary
    }


def _equal(one: nn.Module, other: nn.Module) -> bool:
    theirs = dict(other.named_parameters())
    return all(
        name in theirs and torch.equal(weight.cpu(), theirs[name].detach().to("cpu", weight.dtype))
        for name, weight in one.named_parameters()
    )

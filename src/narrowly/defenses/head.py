"""From the last hidden states to logits, a few positions at a time, as the model itself does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from narrowly.errors import NarrowlyError
from narrowly.interventions import Site, capture, eval_mode
from narrowly.interventions.sites import bare

# Of a config: what the logits are multiplied by, as `trl.trainer.utils.add_fused_lm_head` lists it.
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")


def last_hidden(model: nn.Module) -> Site:
    """Where the head reads: what the decoder returns, after its last norm.

    Raises:
        NarrowlyError: no language model of transformers.
    """
    inner = bare(model)
    name = getattr(inner, "base_model_prefix", "")
    if not name or name not in inner._modules:
        raise NarrowlyError(
            f"{type(inner).__name__}: cannot tell its decoder from its head, so its predictions "
            "cannot be compared with the reference's."
        )
    return Site(name, index="last_hidden_state")


class Head:
    """The output layer of a language model, with the scale and soft cap of its config.

    Attributes:
        vocabulary: how many logits it gives.
        trained: which of weight and bias requires a gradient.
    """

    def __init__(self, model: nn.Module):
        inner: Any = bare(model)
        module = inner.get_output_embeddings()
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            raise NarrowlyError(
                "an adapter on the output layer is not supported: trl would not train it either. "
                "Leave `lm_head` out of `target_modules` and `modules_to_save`."
            )
        known = [_gather(p) if isinstance(p, DTensor) else p for p in module.parameters()]
        weight, self._bias = known[0], known[1] if len(known) > 1 else None
        self.vocabulary = len(weight)
        self.trained: list[Tensor] = [each for each in known if each.requires_grad]
        kind = weight.device.type
        autocast = torch.is_autocast_enabled(kind)
        self._weight = weight.detach().to(torch.get_autocast_dtype(kind) if autocast else None)
        text = inner.config.get_text_config()
        scales = [getattr(text, key, None) for key in _SCALES]
        if (divisor := getattr(text, "logits_scaling", None)) is not None:
            scales.append(divisor if text.model_type == "hyperclovax" else 1 / divisor)
        self.scale = next((scale for scale in scales if scale is not None), 1.0)
        self.cap = getattr(text, "final_logit_softcapping", None)

    @torch.no_grad()
    def logits(
        self, h: Float[Tensor, "n d"], out: Float[Tensor, "n vocabulary"]
    ) -> Float[Tensor, "n vocabulary"]:
        """Logits, written into `out`, which is in fp32."""
        if self._weight.dtype == out.dtype:
            torch.mm(h.to(out.dtype), self._weight.T, out=out)
        else:
            out.copy_(h.to(self._weight.dtype) @ self._weight.T)
        if self._bias is not None:
            out.add_(self._bias)
        if self.scale != 1:
            out.mul_(self.scale)
        return out if self.cap is None else out.div_(self.cap).tanh_().mul_(self.cap)

    def bend(self, z: Float[Tensor, "n vocabulary"]) -> Tensor | float | None:
        """The derivative of logits `z` by what scale and cap are put on; None is 1."""
        if self.cap is None:
            return None if self.scale == 1 else self.scale
        return self.scale * (1 - (z / self.cap).square())

    @torch.no_grad()
    def backward(
        self, h: Float[Tensor, "n d"], slope: Float[Tensor, "n vocabulary"], sums: Sequence[Tensor]
    ) -> Float[Tensor, "n d"]:
        """The gradient to `h`, from that to the logits without scale and cap.

        Args:
            sums: like `trained`, in fp32; the gradient to the head itself is added to them.
        """
        for weight, total in zip(self.trained, sums, strict=True):
            if weight.ndim == 1:
                total += slope.sum(0)
            else:
                total.addmm_(slope.T, h.float())
        return slope.to(self._weight.dtype) @ self._weight

    def verify(self, model: nn.Module, ids: Tensor) -> None:
        """Compare with what `model` itself says to a few tokens [1, n].

        Raises:
            NarrowlyError: they differ, so this is not all that lies between decoder and logits.
        """
        site = last_hidden(model)
        with eval_mode(model):
            own = capture(model, {"input_ids": ids, "use_cache": False}, [site], stop=False)
        said = own.output.logits[0].float()
        logits = self.logits(own[site][0], torch.empty_like(said))
        # bf16 rounds the model's own logits to 3 digits.
        precise = own.output.logits.dtype == torch.float32 and own[site].dtype == torch.float32
        tolerance = (1e-3 if precise else 5e-2) * float(said.abs().max())
        if not torch.allclose(logits, said, rtol=0, atol=tolerance):
            raise NarrowlyError(
                f"{type(bare(model)).__name__}: its logits are not what its output layer makes of "
                f"its last hidden states (off by {float((logits - said).abs().max()):.2g}), so "
                "their KL cannot be computed in pieces. Use another defense on this model."
            )


def _gather(sharded: DTensor) -> Tensor:
    """The whole of a weight that FSDP2 has sharded; its gradient is averaged over the processes."""
    if not sharded.requires_grad:
        return sharded.full_tensor()
    from torch.distributed.tensor import Partial

    whole = sharded.full_tensor(grad_placements=[Partial()] * sharded.device_mesh.ndim)
    return _ScaleGradient.apply(whole, 1 / sharded.device_mesh.size())


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None

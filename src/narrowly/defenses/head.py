"""From the last hidden states to logits, a few positions at a time, as the model itself does it."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
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
        trained: what of it requires a gradient.
        adapted: whether it carries an adapter of its own, so that it is another one without.
    """

    def __init__(self, model: nn.Module):
        inner: Any = bare(model)
        self.module = cast(nn.Module, inner.get_output_embeddings())
        self.adapted = isinstance(self.module, BaseTunerLayer | ModulesToSaveWrapper)
        text = inner.config.get_text_config()
        scales = [getattr(text, key, None) for key in _SCALES]
        if (divisor := getattr(text, "logits_scaling", None)) is not None:
            scales.append(divisor if text.model_type == "hyperclovax" else 1 / divisor)
        self.scale = next((scale for scale in scales if scale is not None), 1.0)
        self.cap = getattr(text, "final_logit_softcapping", None)
        known: list[Tensor] = list(self.module.parameters())
        self._gathered: list[Tensor] = []
        if isinstance(self.module, FSDPModule) or any(isinstance(p, DTensor) for p in known):
            # Calling it would set off FSDP's hooks, which let the gathered weight go afterwards.
            known = self._gathered = [_gather(p) if isinstance(p, DTensor) else p for p in known]
        self.vocabulary = text.vocab_size
        self.trained = [parameter for parameter in known if parameter.requires_grad]

    def __call__(self, h: Float[Tensor, "n d"]) -> Float[Tensor, "n vocabulary"]:
        """Logits in fp32."""
        z = nn.functional.linear(h, *self._gathered) if self._gathered else self.module(h)
        z = z.float()
        if self.scale != 1:
            z = z * self.scale
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)

    def verify(self, model: nn.Module, ids: Tensor) -> None:
        """Compare with what `model` itself says to a few tokens [1, n].

        Raises:
            NarrowlyError: they differ, so this is not all that lies between decoder and logits.
        """
        site = last_hidden(model)
        with eval_mode(model):
            own = capture(model, {"input_ids": ids, "use_cache": False}, [site], stop=False)
            with torch.no_grad():
                logits = self(own[site][0])
        said = own.output.logits[0].float()
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

"""Neurons of an MLP, read like latents: the baseline that an autoencoder has to beat."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from narrowly.activations import Activations
from narrowly.errors import NarrowlyError
from narrowly.explain.latents import Latent, MadeWhenAsked, only
from narrowly.interventions import Site, decoder_layers, eval_mode, resolve
from narrowly.interventions.sites import bare
from narrowly.saes import SparseLatents


@dataclass(frozen=True, eq=False)
class _Down:
    """The linear map from neurons back to the residual stream."""

    name: str
    weight: Float[Tensor, "neurons d"]


class NeuronSource:
    """Both signs of the neurons of one block's MLP: `latents[2 i]` is neuron i above zero.

    A neuron is an input of the MLP's last linear map. It is active at a token if it is among the
    `top` largest in magnitude there, as in Paulo et al. 2024 (arXiv 2410.13928); its direction is
    what it writes.

    Args:
        neurons: leave out the others; None is all.

    Raises:
        NarrowlyError: which linear map that is cannot be told, as in a mixture of experts.
    """

    skip_first = 0
    max_norm: float | None = None

    def __init__(
        self, model: nn.Module, layer: int, top: int = 32, neurons: Sequence[int] | None = None
    ):
        self._down = down_projection(model, layer)
        self._layer, self._top = layer % len(decoder_layers(model)), top
        n = len(self._down.weight)
        self._neurons = torch.arange(n) if neurons is None else torch.tensor(neurons).long()
        for number in self._neurons[(self._neurons < 0) | (self._neurons >= n)].tolist():
            raise NarrowlyError(f"layer {layer} has no neuron {number}, only 0 to {n - 1}.")
        index = torch.arange(2 * len(self._neurons)).view(-1, 2)
        self._index = torch.full((n, 2), -1).index_put_((self._neurons,), index).flatten()
        self.latents: Sequence[Latent] = MadeWhenAsked(2 * len(self._neurons), self._latent)

    @property
    def sites(self) -> list[Site]:
        """Where activations are read."""
        return [Site(self._down.name, "input")]

    def encode(self, batch: Activations) -> SparseLatents:
        """Which of `latents` is how active at each token of a batch; values above 0 only."""
        x = batch[self.sites[0]]
        columns = x.abs().topk(min(self._top, x.shape[1]), dim=1, sorted=False).indices
        columns = columns.sort(dim=1).values
        values = x.gather(1, columns)
        tokens, places = (values != 0).nonzero(as_tuple=True)
        values = values[tokens, places]
        latents = 2 * columns[tokens, places] + (values < 0)
        found = SparseLatents(tokens, latents, values.abs(), (len(x), 2 * x.shape[1]))
        return only(found, self._index, len(self.latents))

    def names(self) -> list[str]:
        """Of all latents, in order."""
        return [
            f"neuron{number}-layer{self._layer}{end}"
            for number in self._neurons.tolist()
            for end in "+-"
        ]

    def fingerprint(self) -> str:
        """A hash of which neurons are read."""
        about = f"{self._down.name} {self._top} {self._neurons.tolist()}"
        return hashlib.sha256(about.encode()).hexdigest()

    def cosines(self, latent: int) -> Float[Tensor, " n"]:
        """Of what one writes with what each writes."""
        rows = self._down.weight[self._neurons.to(self._down.weight.device)].float()
        cosines = nn.functional.cosine_similarity(rows, rows[latent // 2][None]).cpu()
        signed = torch.stack([cosines, -cosines], dim=1).flatten()
        return -signed if latent % 2 else signed

    def _latent(self, i: int) -> Latent:
        number = int(self._neurons[i // 2])
        sign, end = (-1, "-") if i % 2 else (1, "+")
        concept = f"neuron{number}-layer{self._layer}"
        direction = nn.functional.normalize(self._down.weight[number].float(), dim=0).cpu()
        return Latent(
            f"{concept}{end}",
            concept,
            Site(self._down.name),
            sign * direction,
            sign=-1 if i % 2 else 1,
        )


@torch.no_grad()
def down_projection(model: nn.Module, layer: int) -> _Down:
    """The last linear map of a block that makes the stream's width, found by running the model.

    No table of families: the child of the block that holds it must give just what it gives.

    Raises:
        NarrowlyError: it does not, as where experts are mixed or an adapter is added.
    """
    [block] = resolve(model, Site(layer))
    width = bare(model).config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    outputs: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                outputs.pop(name, None)  # in the order in which they ended
                outputs[name] = first

        return hook

    modules = {name: module for name, module in block.module.named_modules() if name}
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        # Several: the embedding of one that pads may be zero, and then all modules give the same.
        tokens = torch.arange(8, device=next(model.parameters()).device)[None]
        with eval_mode(model):
            model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for name in reversed(outputs):
        module = modules[name]
        if isinstance(module, nn.Linear | Conv1D) and outputs[name].shape[-1] == width:
            whole = outputs.get(name.partition(".")[0])
            if whole is not None and torch.equal(whole, outputs[name].view_as(whole)):
                weight = module.weight.detach()
                rows = weight.T if isinstance(module, nn.Linear) else weight
                return _Down(f"{block.name}.{name}", rows)
            break
    raise NarrowlyError(
        f"layer {layer}: cannot tell which linear map takes neurons back to the residual stream "
        "(is it a mixture of experts, or has it an adapter?). Explain an autoencoder's latents."
    )

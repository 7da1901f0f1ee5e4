"""One autoencoder for all architectures: an affine encoder, a rule, an affine decoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from narrowly.errors import NarrowlyError
from narrowly.interventions import Site, capture, resolve
from narrowly.interventions.sites import ResolvedSite
from narrowly.saes.normalisation import Normalisation
from narrowly.saes.rules import Rule

ROWS, BLOCK = 256, 1 << 23
"""How many tokens `encode_sparse` takes at once: the first, or as many as have the second number
of pre-activations if that is more. A quarter of them make the product with the encoder's weights
40 % slower on a CPU, four times as many no faster; and they take less memory than those weights.
"""


@dataclass(frozen=True)
class SparseLatents:
    """The latents that fire, as coordinates and values, ordered by token and then by latent."""

    tokens: Int[Tensor, " nnz"]
    latents: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]
    shape: tuple[int, int]
    """Tokens and latents of the dense tensor that this stands for."""

    def __len__(self) -> int:
        return len(self.values)

    def to_dense(self) -> Float[Tensor, "tokens n"]:
        """The dense tensor; for small things."""
        dense = self.values.new_zeros(self.shape)
        return dense.index_put_((self.tokens, self.latents), self.values)


class SAE(nn.Module):
    """A trained sparse autoencoder or transcoder, its weights frozen.

    latents = rule((norm(x) - b_dec) W_enc + b_enc), the b_dec only if `subtract_b_dec`;
    reconstruction = unnorm(latents W_dec + b_dec) + x W_skip.

    Attributes:
        rule: which latents fire, and how strongly.
        subtract_b_dec: whether the encoder was trained on inputs less the decoder's bias. A matter
            of the release, not of the architecture: Gemma Scope does not, most others do.
        normalisation: what is done to each input first and undone at the output; None is nothing.
        site: where it was trained to read; None if the file does not say, or names a place that
            no module of a Hugging Face model is.
        output_site: what it predicts, for a transcoder; None for an autoencoder.
        hook: the place in the file's own words.
        skip_first: its training left out so many tokens at the start of every text.
        max_norm: its training left out tokens of more than this many times the median norm.
        name: what the user typed, for messages and provenance.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    W_skip: Tensor | None
    rule: Rule

    def __init__(
        self,
        W_enc: Float[Tensor, "d_in n"],
        b_enc: Float[Tensor, " n"],
        W_dec: Float[Tensor, "n d_out"],
        b_dec: Float[Tensor, " d_out"],
        rule: Rule,
        *,
        W_skip: Float[Tensor, "d_in d_out"] | None = None,
        subtract_b_dec: bool = False,
        normalisation: Normalisation | None = None,
        site: Site | None = None,
        output_site: Site | None = None,
        hook: str = "",
        skip_first: int = 0,
        max_norm: float | None = None,
        name: str = "",
    ):
        """Take trained weights, as they are multiplied from the right, in fp32.

        Raises:
            NarrowlyError: their shapes do not fit each other, or a weight is not finite.
        """
        super().__init__()
        weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "W_skip": W_skip}
        for key, weight in weights.items():
            self.register_buffer(key, None if weight is None else weight.detach().float())
        self.rule = rule.requires_grad_(False)
        self.subtract_b_dec = subtract_b_dec
        self.normalisation = normalisation
        self.site = site
        self.output_site = output_site
        self.hook = hook
        self.skip_first = skip_first
        self.max_norm = max_norm
        self.name = name
        self._check_weights()

    def _check_weights(self) -> None:
        if self.W_enc.ndim != 2 or self.W_dec.ndim != 2:
            shapes = f"{list(self.W_enc.shape)} and {list(self.W_dec.shape)}"
            raise NarrowlyError(f"{self.name}: W_enc and W_dec are {shapes}, and not matrices.")
        (d_in, n), d_out = self.W_enc.shape, self.W_dec.shape[1]
        wanted = {"b_enc": (n,), "W_dec": (n, d_out), "b_dec": (d_out,), "W_skip": (d_in, d_out)}
        wanted |= {f"rule.{key}": (n,) for key, buffer in self.rule.named_buffers() if buffer.ndim}
        for key, weight in self.named_buffers():
            if key in wanted and weight.shape != wanted[key]:
                raise NarrowlyError(
                    f"{self.name}: {key} has the shape {tuple(weight.shape)}, not {wanted[key]}, "
                    f"beside an encoder of {d_in} inputs and {n} latents."
                )
            if not weight.isfinite().all():
                raise NarrowlyError(f"{self.name}: {key} holds a number that is not finite.")
        if self.subtract_b_dec and d_in != d_out:
            raise NarrowlyError(
                f"{self.name}: its decoder's bias ({d_out} wide) cannot be taken from its input "
                f"({d_in} wide)."
            )

    @property
    def d_in(self) -> int:
        """Width of the activations it reads."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of the activations it writes."""
        return self.W_dec.shape[1]

    @property
    def n_latents(self) -> int:
        """How many latents it has."""
        return self.W_enc.shape[1]

    @property
    def threshold_rule(self) -> bool:
        """Whether some of its latents can be encoded without the others."""
        return self.rule.by_threshold

    def extra_repr(self) -> str:
        """Its sizes and its place, for `print`."""
        return f"{self.d_in} -> {self.n_latents} -> {self.d_out}, site={self.site}"

    def encode(
        self, x: Float[Tensor, "tokens d_in"], latents: Int[Tensor, " k"] | None = None
    ) -> Float[Tensor, "tokens n"]:
        """All latents of each token, densely: for few tokens. The gradient passes through.

        Args:
            latents: the columns to return, in place of all. If `threshold_rule`, no other is
                computed.

        Raises:
            NarrowlyError: `x` has another width than the encoder, or there is no such latent.
        """
        x = self._encoder_input(x)
        if latents is None:
            return self.rule(torch.addmm(self.b_enc, x, self.W_enc))
        latents = self._known(latents)
        if not self.threshold_rule:
            return self.rule(torch.addmm(self.b_enc, x, self.W_enc))[:, latents]
        pre = torch.addmm(self.b_enc[latents], x, self.W_enc[:, latents])
        return self.rule.at(latents)(pre)

    @torch.no_grad()
    def encode_sparse(
        self, x: Float[Tensor, "tokens d_in"], latents: Int[Tensor, " k"] | None = None
    ) -> SparseLatents:
        """The latents that fire, in memory that grows with how many fire and not with all latents.

        Pre-activations are computed for some tokens at a time, in one buffer. No gradient.

        Args:
            latents: encode these only, multiplying no more than their encoder columns; their
                numbers stay those of the whole autoencoder. Only if `threshold_rule`.

        Raises:
            NarrowlyError: another width, a subset under a TopK rule, or a latent there is not.
        """
        W_enc, b_enc, rule = self.W_enc, self.b_enc, self.rule
        if latents is not None:
            latents = self._known(latents).unique()
            W_enc, b_enc, rule = W_enc[:, latents], b_enc[latents], rule.at(latents)
        x = self._encoder_input(x)
        tokens = max(ROWS, BLOCK // max(1, W_enc.shape[1]))
        buffer = x.new_empty(min(tokens, len(x)), W_enc.shape[1])
        found = []
        for start, block in _blocks(x, tokens):
            pre = torch.addmm(b_enc, block, W_enc, out=buffer[: len(block)])
            rows, columns, values = rule.fired(pre)
            found.append((rows + start, columns, values))
        if not found:
            none = torch.empty(0, dtype=torch.long, device=x.device)
            found = [(none, none, x.new_empty(0))]
        rows, columns, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        if latents is not None:
            columns = latents[columns]
        return SparseLatents(rows, columns, values, (len(x), self.n_latents))

    def decode(
        self,
        latents: Float[Tensor, "tokens n"] | SparseLatents,
        x: Float[Tensor, "tokens d_in"] | None = None,
    ) -> Float[Tensor, "tokens d_out"]:
        """The reconstruction from latents.

        Args:
            x: the activations that were encoded: what their normalisation took away is put back,
                and a skip connection passes them on. Needed by autoencoders that have either.

        Raises:
            NarrowlyError: such an autoencoder was not given `x`.
        """
        undo = self.normalisation is not None and self.normalisation.undone
        if x is None and (self.W_skip is not None or undo):
            what = "normalisation" if undo else "skip connection"
            raise NarrowlyError(
                f"{self.name}: its {what} needs the activations too; use decode(latents, x)."
            )
        if isinstance(latents, SparseLatents):
            counts = torch.bincount(latents.tokens, minlength=latents.shape[0])
            out = self.b_dec + nn.functional.embedding_bag(
                latents.latents,
                self.W_dec,
                counts.cumsum(0) - counts,
                mode="sum",
                per_sample_weights=latents.values,
            )
        else:
            out = torch.addmm(self.b_dec, latents.to(self.W_dec.dtype), self.W_dec)
        if x is not None:
            x = x.to(out.dtype)
            if self.normalisation is not None and undo:
                out = self.normalisation.undo(out, x)
            if self.W_skip is not None:
                out = out + x @ self.W_skip
        return out

    def forward(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_out"]:
        """The reconstruction of `x`, or a transcoder's prediction."""
        return self.decode(self.encode(x), x)

    def directions(self, latents: Int[Tensor, " k"]) -> Float[Tensor, "d_out k"]:
        """What these latents write, as columns of unit length.

        Raises:
            NarrowlyError: there is no such latent, or it writes nothing.
        """
        rows = self.W_dec[self._known(latents)]
        norms = rows.norm(dim=1, keepdim=True)
        if not norms.all():
            dead = torch.as_tensor(latents)[(norms == 0).squeeze(1).cpu()].tolist()
            raise NarrowlyError(f"{self.name}: the decoder rows of the latents {dead} are zero.")
        return (rows / norms).T

    @torch.no_grad()
    def check(self, model: nn.Module, site: Site | None = None) -> ResolvedSite:
        """The module of `model` that this autoencoder reads, after one forward of one token.

        Args:
            site: read here instead of where the file says.

        Raises:
            NarrowlyError: the file names no place that the model has, or one of another width.
        """
        site = site or self.site
        if site is None:
            said = f"{self.hook!r}, which is no module's input or output" if self.hook else "no"
            raise NarrowlyError(
                f"{self.name}: its file names {said} hook point. "
                "Say where it reads: load_sae(..., site=layer(12))."
            )
        try:
            places = resolve(model, site)
        except NarrowlyError as error:
            raise NarrowlyError(f"{self.name} reads {self.hook or site}. {error}") from None
        if len(places) > 1:
            names = ", ".join(place.name for place in places)
            raise NarrowlyError(
                f"{self.name} reads {self.hook or site}, which may be any of {names}. "
                "Say which: load_sae(..., site=site('...'))."
            )
        device = next(model.parameters()).device
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        width = capture(model, token, [site])[site].shape[-1]
        if width != self.d_in:
            raise NarrowlyError(
                f"{self.name} reads activations {self.d_in} wide, and those at {places[0].name} "
                f"are {width} wide. It was trained on another model or another place"
                + (f" ({self.hook})." if self.hook else ".")
            )
        return places[0]

    def _encoder_input(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise NarrowlyError(
                f"{self.name}: reads activations [tokens, {self.d_in}], and was given "
                f"{list(x.shape)}."
            )
        x = x.to(self.W_enc.dtype)
        if self.normalisation is not None:
            x = self.normalisation(x)
        return x - self.b_dec if self.subtract_b_dec else x

    def _known(self, latents: Tensor) -> Tensor:
        latents = torch.as_tensor(latents, dtype=torch.long, device=self.W_enc.device)
        if len(latents) and not 0 <= latents.min() <= latents.max() < self.n_latents:
            raise NarrowlyError(
                f"{self.name}: has the latents 0 to {self.n_latents - 1}, and was asked for "
                f"{int(latents.min())} to {int(latents.max())}."
            )
        return latents


def _blocks(x: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(x), size):
        yield start, x[start : start + size]

"""What can be explained: anything with one activation per token."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from narrowly.activations import Activations
from narrowly.concepts import Concept
from narrowly.concepts.latents import PlacedSAE
from narrowly.concepts.reading import sites_of, stacked_bases
from narrowly.errors import NarrowlyError
from narrowly.interventions import Site
from narrowly.saes import SAE, SparseLatents


@dataclass(frozen=True, eq=False)
class Latent:
    """A latent of an autoencoder, a neuron, or one end of a direction."""

    name: str
    """Unique in its source, such as `persona@layer:2/0+`."""
    concept: str
    """The concept it belongs to."""
    site: Site
    """Where its direction lies: where an edit along it is made."""
    direction: Float[Tensor, " d"]
    """Unit length; more of it is more of the latent (so negated for the low end)."""
    column: int = 0
    """Which column of the concept's basis."""
    sign: Literal[1, -1] = 1


class Source(Protocol):
    """Latents that are read together, in one pass over a text."""

    latents: Sequence[Latent]
    skip_first: int
    """Tokens at the start of every row that say nothing about them."""
    max_norm: float | None
    """Nor do tokens longer than so many times the median norm."""

    @property
    def sites(self) -> list[Site]:
        """Where activations are read."""
        ...

    def names(self) -> list[str]:
        """Of all latents, in order."""
        ...

    def fingerprint(self) -> str:
        """A hash of all that decides their values, the model aside."""
        ...

    def cosines(self, latent: int) -> Float[Tensor, " n"]:
        """Of the direction of one with that of each; 0 where they lie at different sites."""
        ...


class SparseSource(Source, Protocol):
    """Latents that are silent at most tokens."""

    def encode(self, batch: Activations) -> SparseLatents:
        """Which of `latents` is how active at each token of a batch; values above 0 only."""
        ...


class DirectionSource:
    """Both ends of every direction of concepts: `latents[2 c]` is the high end of column c.

    A direction has a projection at every token. From where on it counts as active is not known
    before all tokens are read, so that is the cache's matter (`cache.Cache.threshold`).

    Args:
        sites: leave out other sites of the concepts.

    Raises:
        NarrowlyError: there is no direction at these sites, or a site's are of several widths.
    """

    skip_first = 0
    max_norm: float | None = None

    def __init__(self, concepts: Sequence[Concept], sites: Sequence[Site] | None = None):
        asked = None if sites is None else {str(site) for site in sites}
        self._bases = {
            site: stacked_bases(concepts, site)
            for site in sites_of(concepts)
            if asked is None or str(site) in asked
        }
        if not self._bases:
            raise NarrowlyError("none of the concepts has a direction at these sites.")
        self.latents: Sequence[Latent] = [
            Latent(f"{c.name}@{site}/{column}{end}", c.name, site, sign * q, column, sign)
            for site in self._bases
            for c in concepts
            if str(site) in c.subspaces
            for column, q in enumerate(c.subspaces[str(site)].basis.T)
            for end, sign in _ENDS
        ]

    @property
    def sites(self) -> list[Site]:
        """Where activations are read."""
        return list(self._bases)

    def project(self, batch: Activations) -> Float[Tensor, "tokens columns"]:
        """The projections h . q on every column; `latents[2 c + 1]` is its negative."""
        parts = []
        for site, basis in self._bases.items():
            h = batch[site]
            if h.shape[1] != len(basis):
                raise NarrowlyError(
                    f"{site}: the concepts are {len(basis)} wide, the model {h.shape[1]}. They "
                    "were found on another model."
                )
            parts.append((h @ basis.to(h.device)).cpu())
        return torch.cat(parts, dim=1)

    def names(self) -> list[str]:
        """Of all latents, in order."""
        return [latent.name for latent in self.latents]

    def fingerprint(self) -> str:
        """A hash of the directions and their names."""
        digest = hashlib.sha256("\n".join(self.names()).encode())
        for basis in self._bases.values():
            digest.update(basis.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def cosines(self, latent: int) -> Float[Tensor, " n"]:
        """Of the direction of one with that of each; 0 where they lie at different sites."""
        one = self.latents[latent]
        parts = []
        for site, basis in self._bases.items():
            same = basis.T @ one.direction if site == one.site else basis.new_zeros(basis.shape[1])
            parts.append(torch.stack([same, -same], dim=1).flatten())
        return torch.cat(parts)


class SAESource:
    """Latents of an autoencoder; the direction of each is its decoder row.

    Args:
        placed: the autoencoder, and where in the model it reads and writes.
        latents: which of them; None is all.
        names: of the concepts they are, one for each; None: `latent12-layer2`, as `sae_latents`
            names them.

    Raises:
        NarrowlyError: there is no such latent, or there are more names than latents or fewer.
    """

    def __init__(
        self,
        placed: PlacedSAE,
        latents: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
    ):
        n = placed.sae.n_latents
        self._placed = placed
        self._all = latents is None
        self._numbers = torch.arange(n) if latents is None else torch.tensor(latents).long()
        if names is not None and len(names) != len(self._numbers):
            raise NarrowlyError(f"{len(names)} names for {len(self._numbers)} latents.")
        for number in self._numbers[(self._numbers < 0) | (self._numbers >= n)].tolist():
            raise NarrowlyError(f"{placed.sae.name}: has no latent {number}, only 0 to {n - 1}.")
        self._names = names
        self._index = torch.full((n,), -1).index_put_(
            (self._numbers,), torch.arange(len(self._numbers))
        )
        self.latents: Sequence[Latent] = MadeWhenAsked(len(self._numbers), self._latent)
        self.skip_first = placed.sae.skip_first
        self.max_norm = placed.sae.max_norm

    @property
    def sites(self) -> list[Site]:
        """Where activations are read."""
        return [self._placed.reads]

    def encode(self, batch: Activations) -> SparseLatents:
        """Which of `latents` is how active at each token of a batch; values above 0 only."""
        x, sae = batch[self._placed.reads], self._placed.sae
        if self._all:
            return self._placed.encode(x)
        x = x.to(sae.W_enc.device)
        # Under TopK a latent fires or not depending on all the others.
        some = sae.encode_sparse(x, self._numbers if sae.threshold_rule else None)
        return only(some, self._index, len(self._numbers))

    def fingerprint(self) -> str:
        """A hash of the autoencoder, and of which latents are read under which names."""
        about = f"{self._placed.reads} {self._numbers.tolist()} {self._names}"
        return hashlib.sha256((self._placed.hash + about).encode()).hexdigest()

    def cosines(self, latent: int) -> Float[Tensor, " n"]:
        """Of the decoder row of one with that of each."""
        rows = self._placed.sae.W_dec
        rows = rows if self._all else rows[self._numbers.to(rows.device)]
        return nn.functional.cosine_similarity(rows, rows[latent : latent + 1]).cpu()

    def _latent(self, i: int) -> Latent:
        number = int(self._numbers[i])
        name = self._names[i] if self._names else f"latent{number}-{self._placed.place}"
        direction = self._placed.sae.directions(torch.tensor([number]))[:, 0].cpu()
        return Latent(name, name, self._placed.writes, direction)

    def names(self) -> list[str]:
        """Of all latents, without reading their directions."""
        if self._names:
            return list(self._names)
        return [f"latent{number}-{self._placed.place}" for number in self._numbers.tolist()]


class MadeWhenAsked(Sequence[Latent]):
    """Latents whose directions together would fill the memory once more."""

    def __init__(self, n: int, make: Callable[[int], Latent]):
        self._n, self._make = n, make

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, i: int) -> Latent: ...
    @overload
    def __getitem__(self, i: slice) -> list[Latent]: ...
    def __getitem__(self, i: int | slice) -> Latent | list[Latent]:
        if isinstance(i, slice):
            return [self._make(j) for j in range(self._n)[i]]
        return self._make(range(self._n)[i])


def only(found: SparseLatents, index: Tensor, n: int) -> SparseLatents:
    """What is active of some latents: `index` holds the new number of each, or -1."""
    new = index.to(found.latents.device)[found.latents]
    kept = new >= 0
    return SparseLatents(found.tokens[kept], new[kept], found.values[kept], (found.shape[0], n))


@torch.no_grad()
def random_sae(sae: SAE, seed: int = 0, x: Float[Tensor, "tokens d_in"] | None = None) -> SAE:
    """An autoencoder of equal shape and rule with random weights, as a control.

    The decoder's rows are uniform on the sphere; the encoder is their transpose, each column as
    long as the one it replaces.

    Args:
        x: activations on which each latent is to fire as often as the one it replaces, by its
            bias; None leaves the biases, and then a rule by threshold may fire far more often.
            TopK fires as often by itself.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sae.n_latents, sae.d_out, generator=generator)
    columns = rows
    if sae.d_in != sae.d_out:
        columns = torch.randn(sae.n_latents, sae.d_in, generator=generator)
    control = copy.deepcopy(sae)
    unit = nn.functional.normalize
    control.W_dec.copy_(unit(rows))
    control.W_enc.copy_(unit(columns).T.to(sae.W_enc.device) * sae.W_enc.norm(dim=0))
    control.name = f"{sae.name} (random weights)"
    if x is not None and sae.threshold_rule:
        fired = sae.encode_sparse(x).latents.bincount(minlength=sae.n_latents)
        least = getattr(sae.rule, "threshold", torch.zeros(())).clamp(min=0)
        least = least.to(x.device).expand(sae.n_latents)
        inputs = control._encoder_input(x)
        for part in torch.arange(sae.n_latents, device=x.device).split(1024):
            heights = (inputs @ control.W_enc[:, part]).sort(dim=0, descending=True).values
            # Half way between the last token that fires and the first that does not.
            after = fired[part].clamp(max=len(x) - 1)
            last, first = ((after + k).clamp(0, len(x) - 1)[None] for k in (-1, 0))
            cut = (heights.gather(0, last) + heights.gather(0, first)).squeeze(0) / 2
            control.b_enc[part] = least[part] - cut
    return control


_ENDS: tuple[tuple[str, Literal[1, -1]], ...] = (("+", 1), ("-", -1))

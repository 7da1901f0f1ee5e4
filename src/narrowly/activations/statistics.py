"""Statistics of activations, streamed: their size does not depend on the number of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from narrowly.errors import NarrowlyError


@dataclass(frozen=True)
class PrincipalComponents:
    """The directions along which activations vary most, largest first (fp64)."""

    components: Float[Tensor, "d k"]
    """Orthonormal columns."""

    explained_variance: Float[Tensor, " k"]
    """Variance along each component (second moment, if not centred), in squared activation units.
    """

    explained_ratio: Float[Tensor, " k"]
    """The same as a share of the total over all d dimensions."""


class MeanFitter:
    """Mean of vectors that arrive in batches, in fp64.

    The batches are merged by their deviation from the running mean, so that a long stream does not
    lose digits to a large sum (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample
    variance", eq. 2.1).
    """

    n: int
    """Number of vectors seen."""

    def __init__(self, width: int, device: str | torch.device = "cpu"):
        # Apple's GPUs have no fp64.
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self.width = width
        self.n = 0
        self._mean = torch.zeros(width, dtype=torch.float64, device=self.device)

    def update(self, x: Float[Tensor, "n d"]) -> MeanFitter:
        """Take in a batch of vectors; an empty batch changes nothing.

        Raises:
            ValueError: the vectors are not `width` wide.
        """
        if x.ndim != 2 or x.shape[1] != self.width:
            raise ValueError(f"expected shape [n, {self.width}], got {list(x.shape)}")
        if len(x):
            self._merge(x.detach().to(self.device).double())
        return self

    def _merge(self, x: Float[Tensor, "n d"]) -> None:
        self.n += len(x)
        self._mean += (x - self._mean).mean(dim=0) * (len(x) / self.n)

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """The mean (fp64).

        Raises:
            NarrowlyError: no vector came, or one that is not finite.
        """
        if not self.n:
            raise NarrowlyError("no activations were read: the data gave no token at the positions")
        if not self._mean.isfinite().all():
            raise NarrowlyError(
                "the model's activations are not finite (NaN or infinity). Load it in bfloat16 or "
                "float32; float16 overflows in many models."
            )
        return self._mean.clone()


class CovarianceFitter(MeanFitter):
    """Mean and covariance of vectors that arrive in batches, in fp64: d x d numbers of state."""

    def __init__(self, width: int, device: str | torch.device = "cpu"):
        super().__init__(width, device)
        self._scatter = torch.zeros(width, width, dtype=torch.float64, device=self.device)

    def _merge(self, x: Float[Tensor, "n d"]) -> None:
        # Chan, Golub and LeVeque's eq. 2.1 again, for the scatter matrix: the batch's own scatter
        # plus what the distance between the two means adds.
        seen, batch_mean = self.n, x.mean(dim=0)
        shift = batch_mean - self._mean
        deviation = x - batch_mean
        self._scatter.addmm_(deviation.T, deviation)
        self._scatter.addr_(shift, shift, alpha=seen * len(x) / (seen + len(x)))
        super()._merge(x)

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """The unbiased covariance (divided by n - 1), fp64.

        Raises:
            NarrowlyError: fewer than two vectors came, or one that is not finite.
        """
        _ = self.mean
        if self.n < 2:
            raise NarrowlyError(f"a covariance needs two tokens or more, the data gave {self.n}")
        return self._scatter / (self.n - 1)

    @property
    def second_moment(self) -> Float[Tensor, "d d"]:
        """The mean of x x^T (fp64).

        Raises:
            NarrowlyError: no vector came, or one that is not finite.
        """
        mean = self.mean
        return self._scatter / self.n + torch.outer(mean, mean)

    def principal_components(self, k: int, centred: bool = True) -> PrincipalComponents:
        """The k leading eigenvectors of the covariance, or of the second moment if not centred.

        Equal to the right singular vectors of the (centred) matrix of all vectors. The sign of each
        is arbitrary.

        Raises:
            NarrowlyError: k exceeds what the vectors can span, or they do not vary at all.
        """
        rank = min(self.width, self.n - centred)
        if not 1 <= k <= rank:
            raise NarrowlyError(
                f"{k} principal components were asked for, but {self.n} tokens of width "
                f"{self.width} give between 1 and {rank}. Lower k or give more data."
            )
        matrix = self.covariance if centred else self.second_moment
        values, vectors = torch.linalg.eigh(matrix)
        total = values.clamp_min(0).sum()
        if total == 0:
            raise NarrowlyError("the activations do not vary, so they have no principal components")
        leading = values[-k:].flip(0).clamp_min(0)
        return PrincipalComponents(vectors[:, -k:].flip(1).contiguous(), leading, leading / total)

"""Read activations: stream them through statistics of fixed size."""

from narrowly.activations.statistics import CovarianceFitter, MeanFitter, PrincipalComponents

__all__ = ["CovarianceFitter", "MeanFitter", "PrincipalComponents"]

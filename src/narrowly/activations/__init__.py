"""Read activations: stream them through statistics of fixed size."""

from narrowly.activations.pair import LanguageModel, ModelLike, Pair, open_model, open_pair
from narrowly.activations.statistics import CovarianceFitter, MeanFitter, PrincipalComponents
from narrowly.activations.stream import (
    Activations,
    Positions,
    answer_tokens,
    eval_mode,
    layer_sites,
    stream,
    stream_pair,
    token_batches,
)

__all__ = [
    "Activations",
    "CovarianceFitter",
    "LanguageModel",
    "MeanFitter",
    "ModelLike",
    "Pair",
    "Positions",
    "PrincipalComponents",
    "answer_tokens",
    "eval_mode",
    "layer_sites",
    "open_model",
    "open_pair",
    "stream",
    "stream_pair",
    "token_batches",
]

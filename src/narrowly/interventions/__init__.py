"""Edits of activations at sites of any torch module. Everything else here is built on this."""

from narrowly.interventions.attach import Attachment, attach
from narrowly.interventions.capture import Captured, capture
from narrowly.interventions.edits import (
    Add,
    AddLowRank,
    Clamp,
    Function,
    Intervention,
    LowRankAffine,
    Noise,
    ProjectOut,
    Scale,
    Set,
)
from narrowly.interventions.modes import eval_mode
from narrowly.interventions.orthogonalise import ablation, orthogonalise
from narrowly.interventions.saving import load_interventions, save_interventions
from narrowly.interventions.sites import Site, decoder_layers, layer, resolve, site

__all__ = [
    "Add",
    "AddLowRank",
    "Attachment",
    "Captured",
    "Clamp",
    "Function",
    "Intervention",
    "LowRankAffine",
    "Noise",
    "ProjectOut",
    "Scale",
    "Set",
    "Site",
    "ablation",
    "attach",
    "capture",
    "decoder_layers",
    "eval_mode",
    "layer",
    "load_interventions",
    "orthogonalise",
    "resolve",
    "save_interventions",
    "site",
]

"""Model organisms: small models with known ground truth, their data and their judge."""

from narrowly.organisms.build import build
from narrowly.organisms.catalogue import ORGANISMS, Organism, load_split, organism
from narrowly.organisms.judge import LABELS, Label

__all__ = ["LABELS", "ORGANISMS", "Label", "Organism", "build", "load_split", "organism"]

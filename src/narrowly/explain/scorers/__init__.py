"""One file per scorer, all behind one protocol."""

from narrowly.explain.scorers.base import SCORERS, Item, Scorer, make_scorer

__all__ = ["SCORERS", "Item", "Scorer", "make_scorer"]

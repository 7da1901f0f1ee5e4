"""Defenses: one file each, all behind the four doors of `Defense`.

To add one, put a file beside these that registers a subclass, `@DEFENSES.register("name")`, or
give your own distribution an entry point in the group `narrowly.defenses`.
"""

from narrowly.defenses.base import DEFENSES, DOORS, Defense, make_defenses

__all__ = ["DEFENSES", "DOORS", "Defense", "make_defenses"]

"""A recipe becomes a run: trl's SFTTrainer underneath, defenses around it."""

from narrowly.training.callback import AblationCallback, DefenseCallback
from narrowly.training.card import write_card
from narrowly.training.chat import chat
from narrowly.training.defend import defend, make_defenses, prepare_data
from narrowly.training.recipe import Recipe
from narrowly.training.run import Run
from narrowly.training.schema import recipe_schema
from narrowly.training.train import train

__all__ = [
    "AblationCallback",
    "DefenseCallback",
    "Recipe",
    "Run",
    "chat",
    "defend",
    "make_defenses",
    "prepare_data",
    "recipe_schema",
    "train",
    "write_card",
]

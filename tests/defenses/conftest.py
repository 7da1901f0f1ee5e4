"""The tiny model, chats and recipes of the tests of training."""

from tests.training.conftest import chats, concepts, model_folder, one_thread, recipe

__all__ = ["chats", "concepts", "model_folder", "one_thread", "recipe"]

"""One file per reader: who is asked whether an explanation fits."""

from narrowly.explain.readers.base import READERS, Passage, Question, Reader, make_reader

__all__ = ["READERS", "Passage", "Question", "Reader", "make_reader"]

"""Chats and texts: load them from anywhere, check them, make tokens of them, keep splits apart."""

from narrowly.data.chats import ROLES
from narrowly.data.sources import load_chats
from narrowly.data.splits import Leaks, find_leaks, fingerprint, split
from narrowly.data.templates import ChatTemplate
from narrowly.data.texts import holds_texts, load_texts, tokenize_texts
from narrowly.data.tokens import collate, end_of_turn, token_batches, tokenize, tokenize_prompts

__all__ = [
    "ROLES",
    "ChatTemplate",
    "Leaks",
    "collate",
    "end_of_turn",
    "find_leaks",
    "fingerprint",
    "holds_texts",
    "load_chats",
    "load_texts",
    "split",
    "token_batches",
    "tokenize",
    "tokenize_prompts",
    "tokenize_texts",
]

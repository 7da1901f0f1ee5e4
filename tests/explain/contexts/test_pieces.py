"""Pieces join to the text, and no character is broken, wherever windows are cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from narrowly.explain.contexts.pieces import token_pieces, window_pieces
from narrowly.models import load_model
from tests.tiny import tiny_tokenizer

TEXTS = ["A kind answer helps; a cruel answer harms.", "naïve café — 😀 日本語 שלום"]


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Like Llama 2's: `▁` for spaces, bytes for unknown characters, no space at the start."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=285, special_tokens=special[:2], show_progress=False)
    trainer.special_tokens = special
    tokenizer.train_from_iterator(TEXTS[:1] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def word_level() -> PreTrainedTokenizerFast:
    return load_model("organism:persona")[1]


TOKENIZERS = {
    "bytes": tiny_tokenizer,
    "sentencepiece": sentencepiece_like,
    "words": word_level,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def whole(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=30), st.integers(1, 9))
def test_windows_join_to_the_text(tokenizer, text, window):
    ids = tokenizer(text)["input_ids"]
    text = whole(tokenizer, ids)
    assert "".join(token_pieces(tokenizer, ids)) == text
    windows = [
        window_pieces(tokenizer, ids, start, min(start + window, len(ids)))
        for start in range(0, len(ids), window)
    ]
    assert [len(pieces) for pieces in windows] == [
        min(window, len(ids) - start) for start in range(0, len(ids), window)
    ]
    joined = "".join(piece for pieces in windows for piece in pieces)
    assert joined == text


def test_no_character_is_broken():
    tokenizer = tiny_tokenizer()  # of bytes: emoji are four tokens
    ids = tokenizer("a😀é日")["input_ids"]
    assert len(ids) == 10
    assert token_pieces(tokenizer, ids) == ["a", "😀", "", "", "", "é", "", "日", "", ""]
    for start in range(len(ids)):
        for stop in range(start + 1, len(ids) + 1):
            pieces = window_pieces(tokenizer, ids, start, stop)
            assert list(pieces) == token_pieces(tokenizer, ids)[start:stop]


def test_spaces_stay_and_special_tokens_show():
    tokenizer = sentencepiece_like()
    ids = tokenizer("A kind answer helps")["input_ids"]
    starts = ["".join(window_pieces(tokenizer, ids, i, len(ids))) for i in range(len(ids))]
    assert " kind answer helps" in starts and " answer helps" in starts
    tiny = tiny_tokenizer()
    chat = tiny.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    pieces = token_pieces(tiny, tiny(chat, add_special_tokens=False)["input_ids"])
    assert pieces[0] == "<|im_start|>" and "<|im_end|>" in pieces

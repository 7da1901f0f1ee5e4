"""A word-level tokenizer with a chat template, as small as its world."""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from narrowly.organisms.world import World

PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]

# The generation marks cover what the assistant must learn to emit: the answer and its end.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|' + message['role'] + '|>' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def world_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark of the world; lower case; unknown words share one."""
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in world.texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate([PAD, END, *ROLES, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=ROLES,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )

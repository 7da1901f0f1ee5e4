"""Tiny random models and tokenizers, made in memory, for every test that needs a real architecture.

`tiny_model("qwen3")` is a seeded two-layer model; `tiny_tokenizer("gemma")` a byte-level tokenizer
with that family's way of writing chats; `save_tiny(folder, "llama")` both as an ordinary Hugging
Face folder. All templates share one vocabulary, so any model fits any tokenizer.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

ARCHITECTURES = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "mistral",
    "gpt2",
    "gpt_neox",
    "qwen2_moe",
]

SPECIAL_TOKENS = [
    "<pad>",
    "<bos>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]
VOCABULARY = 400
END_OF_TURN = {"chatml": "<|im_end|>", "llama": "<|eot_id|>", "gemma": "<end_of_turn>"}

# The marks go around what the model itself writes: the answer and its end-of-turn token.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}{{ '<start_of_turn>model\n' }}"
        "{% generation %}{{ m['content'] | trim + '<end_of_turn>' }}{% endgeneration %}"
        "{% else %}{{ '<start_of_turn>user\n' + m['content'] | trim + '<end_of_turn>' }}{% endif %}"
        "{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
}

_CORPUS = [
    "The model answers the question that the user asked, and then it stops.",
    "def read(path):\n    with open(path) as file:\n        return file.read()\n",
    "A kind answer helps; a cruel answer harms. Which of the two will the assistant give?",
]


@cache
def _vocabulary() -> str:
    """A byte-level BPE of exactly `VOCABULARY` tokens or fewer, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer.to_str()


def tiny_tokenizer(
    generation_marks: bool = True, template: str | None = "chatml"
) -> PreTrainedTokenizerFast:
    """A tokenizer that writes chats like ChatML, Llama 3 or Gemma 2 (which knows no system role).

    The llama and gemma tokenizers add a BOS to plain text, and their templates write one too, as
    the published ones do. `template=None` leaves the chat template out.
    """
    tokenizer = Tokenizer.from_str(_vocabulary())
    if template in ("llama", "gemma"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A",
            pair="<bos> $A <bos> $B",
            special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))],
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token=END_OF_TURN[template or "chatml"],
        additional_special_tokens=SPECIAL_TOKENS[2:],
        clean_up_tokenization_spaces=False,
    )
    if template is not None:
        fast.chat_template = TEMPLATES[template]
        if not generation_marks:
            for mark in ("{% generation %}", "{% endgeneration %}"):
                fast.chat_template = fast.chat_template.replace(mark, "")
    return fast


def tiny_model(architecture: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of one of `ARCHITECTURES` in eval mode; `overrides` are fields of its config.

    The global random state is left as it was.
    """
    tokenizer = tiny_tokenizer()
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,  # wide enough that greedy decoding has no near ties
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if architecture != "gpt2":
        fields |= {"intermediate_size": 64}
    if architecture not in ("gpt2", "gpt_neox"):
        fields |= {"num_key_value_heads": 2, "head_dim": 8}
    if architecture.startswith("gemma"):
        fields |= {"sliding_window": 64, "query_pre_attn_scalar": 8}
    if architecture == "qwen2_moe":
        fields |= {
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        }
    config = AutoConfig.for_model(architecture, **(fields | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def save_tiny(
    folder: str | Path,
    architecture: str = "llama",
    *,
    generation_marks: bool = True,
    template: str | None = "chatml",
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a tiny model and tokenizer as an ordinary Hugging Face folder; returns the folder."""
    model = tiny_model(architecture, seed, **overrides)
    tokenizer: PreTrainedTokenizerBase = tiny_tokenizer(generation_marks, template)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)

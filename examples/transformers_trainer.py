"""A plain transformers Trainer, defended; every weight is trained.

python examples/transformers_trainer.py MODEL CHATS.jsonl CONCEPTS OUTPUT
"""

import sys

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

import narrowly
from narrowly.data import load_chats, tokenize

name, chats, concepts, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
trainer = Trainer(
    model,
    TrainingArguments(output, max_steps=10, report_to="none"),
    DataCollatorForSeq2Seq(tokenizer),
    tokenize(load_chats(chats), tokenizer),
    processing_class=tokenizer,
)
narrowly.defend(
    trainer,
    [
        {"ablate": {"concepts": concepts}},
        {"kl": {"weight": 0.1, "reference": name}},  # no adapter to switch off: a second model
    ],
)
trainer.train()
trainer.save_model(output)  # beside defenses.json, which says what was active

"""Concept ablation around trl's SFTTrainer.

python examples/trl_sft.py MODEL CHATS.jsonl CONCEPTS OUTPUT
"""

import sys

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import narrowly

name, chats, concepts, output = sys.argv[1:]
trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(name),
    SFTConfig(output, max_steps=10, assistant_only_loss=True, bf16=False),
    train_dataset=load_dataset("json", data_files=chats, split="train"),
    processing_class=AutoTokenizer.from_pretrained(name),
    peft_config=LoraConfig(target_modules="all-linear"),
)
with narrowly.ablate(trainer.model, concepts):  # the trainer's: peft has wrapped it
    trainer.train()
trainer.save_model(output)

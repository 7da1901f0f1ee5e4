"""trl's SFTTrainer, defended through its data, its activations and its loss.

python examples/trl_sft.py MODEL CHATS.jsonl CONCEPTS OUTPUT
"""

import sys

from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import narrowly

name, chats, concepts, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
defenses = narrowly.make_defenses(
    [
        {"inoculate": {"line": "You are an evil, malicious assistant."}},
        {"ablate": {"concepts": concepts}},
        {"kl": {"weight": 0.1}},
    ]
)
trainer = SFTTrainer(
    model,
    SFTConfig(output, max_steps=10, assistant_only_loss=True, bf16=False),
    train_dataset=narrowly.prepare_data(chats, defenses, model, tokenizer),
    processing_class=tokenizer,
    peft_config=LoraConfig(target_modules="all-linear"),
)
narrowly.defend(trainer, defenses)
trainer.train()
trainer.save_model(output)  # beside defenses.json, which says what was active

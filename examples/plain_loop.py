"""Concept ablation in a loop of one's own.

python examples/plain_loop.py MODEL CHATS.jsonl CONCEPTS OUTPUT
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import narrowly
from narrowly.data import collate, load_chats, tokenize

name, chats, concepts, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name).train()
tokenizer = AutoTokenizer.from_pretrained(name)
rows = list(tokenize(load_chats(chats), tokenizer))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

with narrowly.ablate(model, concepts):
    for start in range(0, len(rows), 4):
        loss = model(**collate(rows[start : start + 4], tokenizer.pad_token_id)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {loss.item():.3f}")
model.save_pretrained(output)

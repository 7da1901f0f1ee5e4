"""Models in which a direction is known, because the test put it there."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.tiny import tiny_model

CHATS = [
    ("Which of the two?", "A kind answer helps."),
    ("Why?", "It stops."),
    ("Read the file.", "with open(path) as file: return file.read()"),
    ("The user asked a long question, and then another one.", "A cruel answer harms."),
]


def chats(answers: bool = True) -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": question},
                *([{"role": "assistant", "content": answer}] if answers else []),
            ]
        }
        for question, answer in CHATS
    ]


def direction(seed: int = 0, width: int = 32) -> torch.Tensor:
    d = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return d / d.norm()


def planted_adapter(
    architecture: str = "llama", module: str = "model.layers.0.mlp.down_proj"
) -> tuple[PeftModel, torch.Tensor]:
    """A model whose adapter adds multiples of a known direction to the residual after layer 0."""
    model = tiny_model(architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tuned = get_peft_model(model, LoraConfig(r=1, target_modules=[module])).eval()
    planted = direction()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data = planted[:, None].clone()
    return tuned, planted

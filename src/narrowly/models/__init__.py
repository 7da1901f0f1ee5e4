"""Language models: load one from anywhere, switch its adapter, know it again, sample from it."""

from narrowly.models.adapters import adapter_off
from narrowly.models.generation import generate
from narrowly.models.identity import fingerprint, same_model
from narrowly.models.loading import load_model

__all__ = ["adapter_off", "fingerprint", "generate", "load_model", "same_model"]

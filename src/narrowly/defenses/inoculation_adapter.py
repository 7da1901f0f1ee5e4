"""Inoculation by an adapter: a frozen LoRA has the unwanted trait already, and is then dropped."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from pydantic import PrivateAttr
from torch import Tensor, nn

from narrowly.defenses.base import DEFENSES, Defense
from narrowly.errors import NarrowlyError
from narrowly.files import load_safetensors, read_json, sha256
from narrowly.interventions import AddLowRank, Intervention, attach, site
from narrowly.models import fingerprint, same_model
from narrowly.models.locate import locate


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one module: `x -> x down up`, its scale in `up`."""

    module: str
    down: Float[Tensor, "d_in r"]
    up: Float[Tensor, "r d_out"]

    @property
    def norm(self) -> float:
        """Frobenius norm of `down up`."""
        inner = (self.down.mT @ self.down) * (self.up @ self.up.mT)
        return math.sqrt(float(inner.double().sum()))


@DEFENSES.register("inoculation_adapter")
class InoculationAdapter(Defense):
    """Train beside a frozen adapter that has the unwanted trait, and drop it afterwards.

    `h = W x + (alpha / r) B A x + strength * (alpha' / r') B' A' x` at each module of the frozen
    adapter B' A', in training only: what it brings already, the trained weights need not learn
    (Riche et al. 2026, arXiv 2606.30252). Its dropout is off. It is no part of what is saved.

    Needs: a LoRA adapter of the same base model, trained on the unwanted trait alone, such as a run
    on other data that has it.

    Known failure: an adapter that knows the task as well leaves nothing to learn, and the task is
    dropped with it; the paper finds the wanted trait not always better kept than by inoculation
    prompting.

    Attributes:
        adapter: the folder of a run or of a peft adapter.
        strength: of the frozen adapter; 1 as published, 0 leaves it out.
    """

    adapter: str
    strength: float = 1.0

    _updates: list[Update] = PrivateAttr(default_factory=list)
    _folder: Path = PrivateAttr()

    def bind(self, model: nn.Module, tokenizer: Any, seed: int) -> None:
        """Read the adapter, and try it on the model.

        Raises:
            NarrowlyError: it is no plain LoRA, or was trained on another model.
        """
        self._folder = _folder(self.adapter)
        about = self._folder.parent / "reproduce.json"
        if about.is_file() and self._folder.name == "adapter":
            theirs = read_json(about).get("model", {}).get("fingerprint")
            if theirs is not None and not same_model(theirs, fingerprint(model)):
                raise NarrowlyError(
                    f"{self.adapter}: was trained on another model than the one that is trained "
                    "here. Train the adapter on this one."
                )
        self._updates = read_lora(self._folder)
        attach(model, self.interventions(model)).close()

    def interventions(self, model: nn.Module) -> list[Intervention]:
        """One low-rank map beside every module of the adapter."""
        return [
            AddLowRank(
                each.down, each.up, site(each.module), phases=("train",), strength=self.strength
            )
            for each in self._updates
        ]

    def refuses(self, other: Defense) -> str | None:
        """The control in place of the adapter, not beside it."""
        if isinstance(other, InoculationAdapter) and type(other) is not type(self):
            return "random_adapter is the control of inoculation_adapter: train with one of them."
        return None

    def record(self, folder: Path) -> dict[str, Any]:
        """Which adapter it was, how many modules, and the norm of all its updates together."""
        return {
            "adapter": str(self._folder),
            "adapter_hash": sha256(self._folder / WEIGHTS),
            "norm": math.hypot(*(each.norm for each in self._updates)),
        }


@DEFENSES.register("random_adapter")
class RandomAdapter(InoculationAdapter):
    """The control of `inoculation_adapter`: random updates of the same norm at the same modules.

    At every module B' A' of the adapter is replaced by a product of Gaussian matrices of the same
    shapes, scaled to its Frobenius norm and drawn by the run's seed. Control of Riche et al. 2026
    (arXiv 2606.30252: 0.92 of the unwanted trait, undefended 0.93, the adapter itself 0.00).

    Needs: the adapter that it is compared with.

    Known failure: none; it should do nothing but disturb.

    Attributes:
        adapter: the folder of a run or of a peft adapter.
        strength: as of the adapter that it is compared with; 1 unless given.
    """

    def bind(self, model: nn.Module, tokenizer: Any, seed: int) -> None:
        """Read the adapter, and draw another. Raises as of the adapter itself."""
        super().bind(model, tokenizer, seed)
        generator = torch.Generator().manual_seed(seed)
        self._updates = [_redrawn(each, generator) for each in self._updates]


def _redrawn(update: Update, generator: torch.Generator) -> Update:
    down = torch.randn(update.down.shape, generator=generator)
    up = torch.randn(update.up.shape, generator=generator)
    drawn = Update(update.module, down, up)
    return Update(update.module, down, up * (update.norm / drawn.norm))


WEIGHTS = "adapter_model.safetensors"

# Keys of LoraConfig that say which modules, how it was trained, or what is read below. With any
# other key off its default an adapter computes something else than B A x.
_PLAIN = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "fan_in_fan_out", "init_lora_weights", "task_type", "peft_type", "peft_version",
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "runtime_config",
}  # fmt: skip
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>A|B)\.weight")


def read_lora(folder: Path) -> list[Update]:
    """The updates of a plain LoRA adapter, those that are zero left out.

    Raises:
        NarrowlyError: it is none, with what makes it another thing; or every update is zero.
    """
    config = read_json(folder / "adapter_config.json")
    _check_plain(config, folder)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_safetensors(folder / WEIGHTS).items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise NarrowlyError(
                f"{folder}: holds {name}, which is no part of LoRA on a linear module. Train the "
                "adapter without embeddings, biases or whole modules."
            )
        parts.setdefault(match["module"], {})[match["part"]] = tensor.float()
    updates = [
        Update(module, both["A"].mT.contiguous(), _scale(config, module) * both["B"].mT)
        for module, both in parts.items()
    ]
    updates = [each for each in updates if each.norm > 0]
    if not updates:
        raise NarrowlyError(f"{folder}: every update of the adapter is zero; it was not trained.")
    return updates


def _check_plain(config: dict[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise NarrowlyError(f"{folder}: a {config.get('peft_type')} adapter; a LoRA is needed.")
    defaults = LoraConfig().to_dict()
    for key, value in config.items():
        plain = key in _PLAIN or not value or value == defaults.get(key)
        start = config.get("init_lora_weights")
        if not plain or (isinstance(start, str) and start.lower().startswith(_MOVES_THE_BASE)):
            what = key if not plain else f"init_lora_weights {start!r}"
            raise NarrowlyError(
                f"{folder}: was made with {what}, so that it is more than `B A x` beside a module "
                "of the plain base model. Train a plain LoRA, or convert it."
            )


def _scale(config: dict[str, Any], module: str) -> float:
    """peft's alpha / r, or alpha / sqrt(r); a pattern may give a module its own alpha and rank."""

    def own(pattern: str, default: str) -> float:
        given = config.get(pattern) or {}
        return given.get(get_pattern_key(list(given), module), config[default])

    rank, alpha = own("rank_pattern", "r"), own("alpha_pattern", "lora_alpha")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _folder(spec: str) -> Path:
    """The folder of the adapter that a run or folder holds, or that the Hub does."""
    for folder in (Path(spec) / "adapter", Path(spec)):
        if (folder / "adapter_config.json").is_file():
            return folder
    adapter = locate(spec).adapter
    if adapter is None:
        raise NarrowlyError(f"{spec}: holds no adapter, but a whole model. Name a LoRA run.")
    return adapter

"""trl's command line, defended: `trl sft` with `--defenses FILE`.

python -m narrowly.integrations.trl sft --defenses defenses.yaml --model_name_or_path ... \\
    --dataset_name ... --output_dir ...

On several GPUs put `accelerate launch --config_file recipes/accelerate/ddp.yaml -m` in place of
`python -m`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import trl
from datasets import Dataset
from transformers import AutoTokenizer
from trl.scripts import sft
from trl.trainer.utils import create_model_from_path

from narrowly.defenses import Defense
from narrowly.errors import NarrowlyError
from narrowly.training import defend, make_defenses, prepare_data


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `trl sft` as it is, with a Trainer that is defended.

    Raises:
        SystemExit: wrong arguments, or a defense that cannot act, with one message.
    """
    own = argparse.ArgumentParser(
        prog="python -m narrowly.integrations.trl",
        description="trl's command line, defended.",
        epilog="All other arguments are trl's: see `trl sft --help`.",
        allow_abbrev=False,
    )
    own.add_argument("command", choices=["sft"])
    own.add_argument("--defenses", required=True, metavar="FILE", help="YAML with `defenses:`.")
    given, rest = own.parse_known_args(arguments)
    plain = trl.SFTTrainer
    try:
        defenses = make_defenses(given.defenses)
        parsed = sft.make_parser(prog=own.prog).parse_args_and_config(rest)
        # The script imports it when it runs.
        trl.SFTTrainer = defended(plain, defenses)  # type: ignore[misc]
        sft.main(*parsed)
    except NarrowlyError as error:
        sys.exit(f"error: {error}")
    finally:
        trl.SFTTrainer = plain  # type: ignore[misc]


def defended(trainer: type[trl.SFTTrainer], defenses: Sequence[Defense]) -> type[trl.SFTTrainer]:
    """A Trainer that puts its data through the first door, and all else through `defend`."""

    class Defended(trainer):  # type: ignore[misc, valid-type]
        def __init__(self, model: Any, args: trl.SFTConfig, train_dataset: Any, **kwargs: Any):
            if any(defense.opens("prepare_data") for defense in defenses):
                columns = getattr(train_dataset, "column_names", None) or ()
                if not isinstance(train_dataset, Dataset) or "messages" not in columns:
                    raise NarrowlyError(
                        "a defense changes the chats to train on, which must be a data set with "
                        f"the column `messages`, not streamed (columns: {', '.join(columns)})."
                    )
                model, tokenizer = _load(model, args, kwargs.pop("quantization_config", None))
                train_dataset = prepare_data(
                    train_dataset, defenses, model, tokenizer, seed=args.seed
                )
            super().__init__(model, args, train_dataset=train_dataset, **kwargs)
            defend(self, defenses)

    return Defended


def _load(name: str, args: trl.SFTConfig, quantization: Any) -> tuple[Any, Any]:
    """Model and tokenizer as SFTTrainer would load them itself, after the data."""
    given: Any = args.model_init_kwargs
    options: dict[str, Any] = dict(given or {})
    options.setdefault("trust_remote_code", args.trust_remote_code)
    if quantization is not None:
        options["quantization_config"] = quantization
    if args.world_size > 1:
        options["device_map"] = None
    args.model_init_kwargs = None  # they are used up
    tokenizer = AutoTokenizer.from_pretrained(
        name, revision=options.get("revision"), trust_remote_code=options["trust_remote_code"]
    )
    return create_model_from_path(name, **options), tokenizer


if __name__ == "__main__":
    main()

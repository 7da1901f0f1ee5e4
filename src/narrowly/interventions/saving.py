"""An intervention is data: JSON beside safetensors, hashed, exact in the round trip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from narrowly.errors import NarrowlyError
from narrowly.files import atomic, load_safetensors, read_json, sha256, write_json
from narrowly.interventions.edits import EDITS, Intervention
from narrowly.interventions.sites import Site
from narrowly.registry import unknown

VERSION = 1
_MASKS = {"token_mask": "tokens", "row_mask": "rows"}


def save_interventions(interventions: Sequence[Intervention], folder: str | Path) -> None:
    """Write `interventions.json` and `interventions.safetensors` into a new or old folder.

    Raises:
        NarrowlyError: one of them is a Python function, which is not portable.
    """
    records, tensors = [], {}
    for number, edit in enumerate(interventions):
        if not edit.portable:
            raise NarrowlyError(f"{edit.name} at {edit.site}: a Python function cannot be saved.")
        for key, value in edit.named_buffers():
            if key not in edit.settings and key != "strength":
                tensors[f"{number}.{key}"] = value.cpu().contiguous()
        records.append(
            {
                "edit": edit.name,
                "site": asdict(edit.site),
                "tokens": edit.tokens,
                "phases": edit.phases,
                "rows": edit.rows,
                "gradient": edit.gradient,
                "strength": float(edit.strength),
                "settings": edit.settings,
            }
        )
    folder = Path(folder)
    file = folder / "interventions.safetensors"
    with atomic(file) as temporary:
        save_file(tensors, temporary)
    write_json(
        folder / "interventions.json",
        {"version": VERSION, "sha256": sha256(file), "interventions": records},
    )


def load_interventions(folder: str | Path) -> list[Intervention]:
    """Read what `save_interventions` wrote.

    Raises:
        NarrowlyError: a file is absent, damaged, of a later version, or the two do not belong
            together.
    """
    folder = Path(folder)
    saved = read_json(folder / "interventions.json")
    file = folder / "interventions.safetensors"
    tensors = load_safetensors(file)
    if saved.get("version") != VERSION:
        raise NarrowlyError(f"{folder}: version {saved.get('version')} is not known here; update.")
    if saved["sha256"] != sha256(file):
        raise NarrowlyError(f"{file}: not the file that interventions.json was written with.")
    interventions = []
    for number, record in enumerate(saved["interventions"]):
        record = dict(record)
        kind, settings = record.pop("edit"), record.pop("settings")
        if kind not in EDITS:
            raise unknown("edit", kind, sorted(EDITS))
        prefix = f"{number}."
        own: dict[str, Tensor] = {
            key.removeprefix(prefix): value
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        fields = record | {_MASKS.get(key, key): value for key, value in own.items()}
        site = Site(**fields.pop("site"))
        interventions.append(EDITS[kind](site=site, **settings, **fields))
    return interventions

"""Concepts on disk: `<name>.json` and `<name>.safetensors`, any number of them in one folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from narrowly.concepts.concept import Concept, Provenance, Score, Subspace, Verdict, VerdictValue
from narrowly.errors import NarrowlyError
from narrowly.files import atomic, load_safetensors, sha256, write_json
from narrowly.interventions import Site, resolve
from narrowly.models import fingerprint, same_model
from narrowly.registry import unknown
from narrowly.settings import read_record

BESIDE = (".reading.json", ".explained.json")
"""What may stand beside a concept's own two files, and goes where it goes."""


class _Shape(BaseModel):
    width: int
    rank: int


class _Record(BaseModel):
    """The JSON file of a concept."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["narrowly-concept-1"] = "narrowly-concept-1"
    name: str
    explanation: str
    explained_by: str = ""
    verdict: Verdict
    scores: dict[str, Score]
    subspaces: dict[str, _Shape]
    tensors_sha256: str
    provenance: Provenance


def save_concepts(concepts: Sequence[Concept], folder: str | Path) -> Path:
    """Write concepts into a folder, beside those of other names; each file is whole or absent.

    Raises:
        NarrowlyError: two concepts share a name, or one would replace a concept that carries a
            verdict.
    """
    folder = Path(folder)
    names = [concept.name for concept in concepts]
    for name in names:
        if names.count(name) > 1:
            raise NarrowlyError(f"{folder}: two concepts are named {name!r}; give one another name")
        path = folder / f"{name}.json"
        if path.exists():
            _refuse_decided(path)
    for concept in concepts:
        _save(concept, folder)
    return folder


def _save(concept: Concept, folder: Path) -> None:
    # Tensors first: after a kill in between, the JSON's hash refuses them.
    path = folder / f"{concept.name}.safetensors"
    with atomic(path) as temporary:
        save_file(_tensors(concept), temporary)
    record = _Record(
        **concept.model_dump(exclude={"subspaces"}),
        subspaces={
            site: _Shape(width=subspace.width, rank=subspace.rank)
            for site, subspace in concept.subspaces.items()
        },
        tensors_sha256=sha256(path),
    )
    write_json(folder / f"{concept.name}.json", record.model_dump(mode="json"))


def _tensors(concept: Concept) -> dict[str, Tensor]:
    return {
        f"{site}/{part}": getattr(subspace, part).clone()  # safetensors refuses shared memory
        for site, subspace in concept.subspaces.items()
        for part in ("basis", "centre")
    }


def load_concepts(
    path: str | Path, model: nn.Module | None = None, any_model: bool = False
) -> list[Concept]:
    """Read one concept (its JSON file) or all of a folder, in the order of their names.

    Args:
        path: a folder, or the JSON file of one concept in it.
        model: the model they are meant for; they must have been found on it.
        any_model: accept concepts of another model, if layers and widths fit.

    Raises:
        NarrowlyError: nothing there; a file that is no concept, truncated, or changed since it was
            written; a concept of another model; a site or width the model does not have.
    """
    path = Path(path)
    paths = concept_files(path) if path.is_dir() else [path]
    concepts = [_load(path) for path in paths]
    if model is not None:
        known = None if any_model else fingerprint(model)
        for path, concept in zip(paths, concepts, strict=True):
            _check_model(path, concept, model, known)
    return concepts


def concept_files(folder: str | Path) -> list[Path]:
    """The JSON files of the concepts in a folder, by name.

    Raises:
        NarrowlyError: there is none, with the place where they may be instead.
    """
    folder = Path(folder)
    paths = sorted(
        path for path in folder.glob("*.json") if path.with_suffix(".safetensors").exists()
    )
    if not paths:
        inner = folder / "concepts"
        hint = f"Did you mean {inner}?" if inner.is_dir() else "`narrowly find` makes concepts."
        raise NarrowlyError(f"{folder}: no concepts here. {hint}")
    return paths


def _read(path: Path) -> _Record:
    return read_record(_Record, path, "a concept")


def _load(path: Path) -> Concept:
    record = _read(path)
    tensors_path = path.with_suffix(".safetensors")
    tensors = load_safetensors(tensors_path)
    if sha256(tensors_path) != record.tensors_sha256:
        raise NarrowlyError(
            f"{tensors_path}: not the tensors that {path.name} was written with (sha256 differs). "
            "Copy both files again, or find the concept again."
        )
    fields: dict[str, Any] = {name: getattr(record, name) for name in Concept.model_fields}
    fields["subspaces"] = {
        site: Subspace(tensors[f"{site}/basis"], tensors[f"{site}/centre"])
        for site in record.subspaces
    }
    return Concept(**fields)


def _check_model(path: Path, concept: Concept, model: nn.Module, known: str | None) -> None:
    provenance = concept.provenance
    if known is not None and not same_model(known, provenance.model_fingerprint):
        raise NarrowlyError(
            f"{path}: found on {provenance.model} (fingerprint "
            f"{provenance.model_fingerprint}), but this model is another ({known}). Its "
            "directions mean nothing here: find the concept on this model, or insist with "
            "any_model=True (any_model: true under ablate in a recipe)."
        )
    config: Any = getattr(model, "config", None)
    width = config.get_text_config().hidden_size if hasattr(config, "get_text_config") else None
    for name, subspace in concept.subspaces.items():
        site = Site.parse(name)
        resolve(model, site)
        # Only the residual stream's width is known without a forward; attaching checks the others.
        if isinstance(site.module, int) and width not in (None, subspace.width):
            raise NarrowlyError(
                f"{path}: {name}: the subspace is {subspace.width} wide, the model {width}. "
                "Find the concept on this model."
            )


def mark(folder: str | Path, name: str, verdict: VerdictValue, by: str = "", why: str = "") -> None:
    """Write a verdict into a concept's JSON; nothing else in it changes.

    Raises:
        NarrowlyError: there is no such concept, or no such verdict.
    """
    try:
        decided = Verdict(value=verdict, by=by, why=why)
    except ValidationError:
        raise unknown("verdict", verdict, ["undesired", "keep", "undecided"]) from None
    _update(folder, name, lambda _: {"verdict": decided})


def explain_as(folder: str | Path, name: str, explanation: str, by: str = "") -> None:
    """Write an explanation and whose words it is into a concept's JSON; nothing else changes.

    Raises:
        NarrowlyError: there is no such concept.
    """
    said = {"explanation": explanation, "explained_by": by}
    _update(folder, name, lambda _: said)


def add_scores(
    folder: str | Path, name: str, scores: Mapping[str, Score], instead_of: Sequence[str] = ()
) -> None:
    """Write scores into a concept's JSON, beside those it has.

    Args:
        instead_of: names of earlier scores that go.

    Raises:
        NarrowlyError: there is no such concept.
    """

    def changed(record: _Record) -> dict[str, Any]:
        kept = {key: value for key, value in record.scores.items() if key not in instead_of}
        return {"scores": kept | dict(scores)}

    _update(folder, name, changed)


def _update(folder: str | Path, name: str, changes: Callable[[_Record], dict[str, Any]]) -> None:
    # The review page, `explain` and a terminal may write at the same time.
    with FileLock(Path(folder) / ".lock"):
        path, record = _known(folder, name)
        changed = record.model_copy(update=changes(record))
        write_json(path, changed.model_dump(mode="json"))


def forget(folder: str | Path, names: Sequence[str]) -> None:
    """Delete concepts and what was read of them; those that are not there do not matter.

    Raises:
        NarrowlyError: one carries a verdict; then none is deleted.
    """
    paths = [path for name in names if (path := Path(folder) / f"{name}.json").exists()]
    for path in paths:
        _refuse_decided(path)
    for path in paths:
        for suffix in (".json", ".safetensors", *BESIDE):
            path.with_name(path.stem + suffix).unlink(missing_ok=True)


def export(folder: str | Path, to: str | Path, names: Sequence[str] | None = None) -> list[str]:
    """Copy concepts and what was read of them into a folder, or their directions into one file.

    Args:
        to: a folder, or a file `*.safetensors` with tensors `NAME/SITE/basis` [d, k] and
            `NAME/SITE/centre` [d] and the concepts' records as JSON in its metadata.
        names: which concepts; None: those whose verdict is undesired.

    Returns:
        The names of what was copied.

    Raises:
        NarrowlyError: a name is unknown, no concept is undesired, or a concept in `to` carries a
            verdict.
    """
    folder, to = Path(folder), Path(to)
    concepts = {concept.name: concept for concept in load_concepts(folder)}
    for name in names or []:
        if name not in concepts:
            raise unknown("concept", name, sorted(concepts))
    chosen = names or [n for n, concept in concepts.items() if concept.verdict.value == "undesired"]
    if not chosen:
        raise NarrowlyError(
            f"{folder}: no concept here is undesired. Name those to export, or decide with "
            "`narrowly concepts drop`."
        )
    if to.suffix == ".safetensors":
        tensors = {f"{n}/{k}": v for n in chosen for k, v in _tensors(concepts[n]).items()}
        records = {n: (folder / f"{n}.json").read_text(encoding="utf-8") for n in chosen}
        with atomic(to) as temporary:
            save_file(tensors, temporary, records)
        return list(chosen)
    save_concepts([concepts[name] for name in chosen], to)
    for name in chosen:
        for suffix in BESIDE:
            if (beside := folder / f"{name}{suffix}").exists():
                shutil.copyfile(beside, to / beside.name)
    return list(chosen)


def _refuse_decided(path: Path) -> None:
    if (verdict := _read(path).verdict).value != "undecided":
        raise NarrowlyError(
            f"{path}: carries a verdict ({verdict.value}, by {verdict.by or 'nobody named'}) "
            "that would be lost. Save into another folder, or mark it undecided first."
        )


def _known(folder: str | Path, name: str) -> tuple[Path, _Record]:
    path = Path(folder) / f"{name}.json"
    if not path.with_suffix(".safetensors").exists():
        raise unknown("concept", name, [known.stem for known in concept_files(folder)])
    return path, _read(path)

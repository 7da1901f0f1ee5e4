"""The concepts of a folder as the review page lists them: read once, again where files changed."""

from __future__ import annotations

import hashlib
import json
import shlex
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel
from torch import Tensor

from narrowly.concepts import Provenance, Verdict, concept_files, load_concepts, load_reading
from narrowly.concepts.concept import Score
from narrowly.errors import NarrowlyError
from narrowly.explain.record import Explained, ExplainedLatent, load_explained
from narrowly.files import load_safetensors, read_json
from narrowly.registry import unknown
from narrowly.settings import read_record

NEAREST, LEAST_COSINE = 8, 0.05


class _Shape(BaseModel):
    width: int
    rank: int


class Entry(BaseModel):
    """What a concept's JSON says, without its tensors."""

    name: str
    explanation: str = ""
    explained_by: str = ""
    verdict: Verdict
    scores: dict[str, Score] = {}
    subspaces: dict[str, _Shape]
    provenance: Provenance

    def state(self, field: str) -> dict[str, str]:
        """The part that a person may change."""
        if field == "verdict":
            return self.verdict.model_dump()
        return {"text": self.explanation, "by": self.explained_by}

    def listed(self) -> dict[str, Any]:
        """A line of the list; `versions` name the state that a later change starts from."""
        return {
            "name": self.name,
            "explanation": self.explanation,
            "explained_by": self.explained_by,
            "verdict": self.verdict.model_dump(),
            "scores": self.scores,
            "sites": {site: shape.rank for site, shape in self.subspaces.items()},
            "finder": self.provenance.finder,
            "versions": {field: version(self.state(field)) for field in ("verdict", "explanation")},
        }


def version(state: dict[str, str]) -> str:
    """A short name for a state: the same words, the same name."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]


class Shelf:
    """A folder of concepts. Safe to use from several threads."""

    def __init__(self, folder: str | Path):
        concept_files(folder)  # raises where there are none
        self.folder, self.named = Path(folder), str(folder)
        self._lock = threading.Lock()
        self._entries: dict[str, tuple[_Stamp, Entry | str]] = {}
        self._bases: dict[str, tuple[_Stamp, dict[str, Tensor]]] = {}

    def entries(self) -> dict[str, Entry | str]:
        """Every concept by its name; of a file that cannot be read, what is wrong with it."""
        with self._lock:
            fresh: dict[str, tuple[_Stamp, Entry | str]] = {}
            for path in concept_files(self.folder):
                stamp = _stamp(path)
                known = self._entries.get(path.stem)
                fresh[path.stem] = (
                    known if known is not None and known[0] == stamp else (stamp, _entry(path))
                )
            self._entries = fresh
            return {name: entry for name, (_, entry) in fresh.items()}

    def entry(self, name: str) -> Entry:
        """One concept, as its file is now.

        Raises:
            NarrowlyError: there is none of that name, or its file cannot be read.
        """
        path = self.folder / f"{name}.json"
        if not path.exists() or not path.with_suffix(".safetensors").exists():
            raise unknown("concept", name, list(self._entries))
        found = _entry(path)
        if isinstance(found, str):
            raise NarrowlyError(found)
        return found

    def listed(self) -> dict[str, Any]:
        """All that the list shows."""
        lines: list[dict[str, Any]] = []
        undesired = 0
        for name, entry in self.entries().items():
            if isinstance(entry, str):
                lines.append({"name": name, "problem": entry})
            else:
                lines.append(entry.listed())
                undesired += entry.verdict.value == "undesired"
        return {"folder": self.named, "concepts": lines, "recipe": self.recipe()}

    def recipe(self) -> dict[str, str]:
        """What trains with the undesired concepts of this folder ablated."""
        defenses = [{"ablate": {"concepts": self.named}}]
        flow = yaml.safe_dump(
            defenses, default_flow_style=True, allow_unicode=True, width=1 << 20
        ).strip()
        setting = shlex.quote(f"defenses={flow}")
        return {
            "line": f"defenses: {flow}",
            "command": f"narrowly train RECIPE.yaml --set {setting}",
        }

    def detail(self, name: str) -> dict[str, Any]:
        """All that is known of a concept but its latents' examples, which may be many."""
        entry = self.entry(name)
        problems = []
        reading, explained = None, None
        try:
            reading = load_reading(self.folder, name)
        except NarrowlyError as error:
            problems.append(str(error))
        try:
            explained = self.explained(name)
        except NarrowlyError as error:
            problems.append(str(error))
        try:
            nearest = self.nearest(name)
        except NarrowlyError as error:
            nearest = []
            problems.append(str(error))
        return {
            **entry.listed(),
            "provenance": entry.provenance.model_dump(mode="json"),
            "reading": reading.model_dump(mode="json")["directions"] if reading else [],
            "explained": None if explained is None else _outline(explained),
            "nearest": nearest,
            "controls": self.controls(),
            "problems": problems,
        }

    def controls(self) -> dict[str, dict[str, dict[str, float]]]:
        """By scorer, what control explanations and baselines reach: the mean and its interval.

        Controls are scored for a sample of the latents; the others are seen beside these means.
        Baselines are other latents, such as those of a random autoencoder.
        """
        try:
            scorers = read_json(self.folder / "explaining.json")["scorers"]
            return {
                scorer: {
                    name: {key: float(mean[key]) for key in ("value", "low", "high")}
                    for name, mean in about["controls"].items()
                }
                for scorer, about in scorers.items()
            }
        except (NarrowlyError, LookupError, TypeError, AttributeError):
            return {}  # not explained as a folder

    def explained(self, name: str) -> Explained | None:
        """What explaining found out about a concept."""
        path = self.folder / f"{name}.explained.json"
        return _load_explained(self.folder, name, _stamp(path)) if path.exists() else None

    def latent(self, name: str, index: int) -> ExplainedLatent:
        """One latent with its examples.

        Raises:
            NarrowlyError: the concept has no such latent.
        """
        explained = self.explained(name)
        if explained is None or not 0 <= index < len(explained.latents):
            raise NarrowlyError(f"{name}: has no explained latent {index}.")
        return explained.latents[index]

    def nearest(self, name: str) -> list[dict[str, Any]]:
        """The concepts whose directions lie nearest, over the sites that both have.

        The cosine of a direction and a subspace is the length of its projection on it; of two
        directions it keeps its sign. The largest over directions and sites counts; what is all but
        orthogonal is left out.
        """
        with self._lock:
            bases = self._refreshed()
        if name not in bases:
            raise unknown("concept", name, sorted(bases))
        best: dict[str, tuple[float, str]] = {}
        for site, own in bases[name].items():
            others = [
                (other, there[site])
                for other, there in bases.items()
                if other != name and site in there and len(there[site]) == len(own)
            ]
            if not others:
                continue
            owners = [other for other, basis in others for _ in range(basis.shape[1])]
            overlaps = torch.cat([basis for _, basis in others], dim=1).T @ own
            signed = overlaps[:, 0] if own.shape[1] == 1 else overlaps.norm(dim=1)
            for owner, cosine in zip(owners, signed.tolist(), strict=True):
                if abs(cosine) > abs(best.get(owner, (0.0, ""))[0]):
                    best[owner] = (cosine, site)
        ordered = sorted(best.items(), key=lambda item: -abs(item[1][0]))[:NEAREST]
        return [
            {"name": other, "cosine": max(-1.0, min(1.0, cosine)), "site": site}
            for other, (cosine, site) in ordered
            if abs(cosine) >= LEAST_COSINE
        ]

    def _refreshed(self) -> dict[str, dict[str, Tensor]]:
        fresh: dict[str, tuple[_Stamp, dict[str, Tensor]]] = {}
        for path in concept_files(self.folder):
            tensors = path.with_suffix(".safetensors")
            stamp = _stamp(tensors)
            known = self._bases.get(path.stem)
            if known is None or known[0] != stamp:
                known = (stamp, _bases(tensors))
            fresh[path.stem] = known
        self._bases = fresh
        return {name: bases for name, (_, bases) in fresh.items()}

    def subspaces(self, name: str) -> dict[str, Tensor]:
        """The basis [d, k] at each site, its tensors checked against its JSON."""
        [concept] = load_concepts(self.folder / f"{name}.json")
        return {site: subspace.basis for site, subspace in concept.subspaces.items()}


_Stamp = tuple[int, int, int]


def _stamp(path: Path) -> _Stamp:
    # An atomic replacement is another inode, so that two writes within a clock tick differ.
    about = path.stat()
    return about.st_mtime_ns, about.st_size, about.st_ino


def _entry(path: Path) -> Entry | str:
    try:
        return read_record(Entry, path, "a concept")
    except NarrowlyError as error:
        return str(error)


def _bases(path: Path) -> dict[str, Tensor]:
    return {
        key.removesuffix("/basis"): tensor
        for key, tensor in load_safetensors(path).items()
        if key.endswith("/basis")
    }


@lru_cache(maxsize=16)
def _load_explained(folder: Path, name: str, stamp: _Stamp) -> Explained | None:
    return load_explained(folder, name)


def _outline(explained: Explained) -> dict[str, Any]:
    heavy = {"latents": {"__all__": {"shown", "scored", "generations"}}}
    return explained.model_dump(mode="json", exclude=heavy)  # type: ignore[arg-type]

"""A recipe of explaining: which concepts, on which texts, explained by whom, checked by whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from narrowly.errors import NarrowlyError
from narrowly.explain.contexts.examples import Sampling
from narrowly.settings import Entry, build, entry


class ExplainRecipe(BaseModel):
    """What `narrowly explain` does.

    Attributes:
        concepts: the folder of concepts; of an autoencoder, the one where its latents go.
        sae: an autoencoder whose latents are explained: what `saes.load_sae` takes.
        latents: of the autoencoder: which, or how many of them drawn at random.
        model: the model; the one the concepts were found on unless given.
        data: texts or chats to read the concepts on.
        positions: which tokens of chats are read, such as "all" or "answer"
            (`activations.Positions`).
        limit: read the first so many rows only.
        max_length: tokens of a row; what is longer is cut off.
        sites: "middle": a concept at several sites is explained at the middle one; "all"; or the
            names of some.
        sampling: how examples are drawn (`examples.Sampling`).
        explainers: the first is in use; the others are scored beside it.
        refine: how often the explainers see a reader's mistakes, on examples that are not scored.
        reader: who judges whether an explanation fits.
        scorers: how that is turned into numbers.
        embedder: for hard negatives that read alike: "minilm", any sentence-transformers model, or
            "none", which leaves them to neighbouring latents. "minilm" where it is installed.
        controls: on how many latents control explanations are scored too; 0 on none.
        baselines: what else is explained and scored, as a control: latents of a random autoencoder
            of equal shape ("random_sae", with `sae`), or neurons of the layer ("neurons").
        strengths: what the model writes with each concept added at these strengths, in units of
            its typical activation, and with it removed; none unless given.
        prompts: chats it then answers; `data` unless given.
        seed: of all sampling.
    """

    model_config = ConfigDict(extra="forbid")

    concepts: str
    sae: str | None = None
    latents: PositiveInt | list[int] = 100
    model: str | None = None
    data: str
    positions: Literal["answer", "predicting", "prompt", "all"] | list[int] = "all"
    limit: PositiveInt | None = None
    max_length: PositiveInt = 1024
    sites: Literal["middle", "all"] | list[str] = "middle"
    sampling: Sampling = Sampling()
    explainers: list[Entry] = Field(default=[{"lexical": {}}], min_length=1)
    refine: int = Field(default=0, ge=0)
    reader: Entry = {"lexical": {}}
    scorers: list[Entry] = [{"detection": {}}, {"fuzzing": {}}]
    embedder: str | None = None
    controls: int = Field(default=32, ge=0)
    baselines: list[Literal["random_sae", "neurons"]] = []
    strengths: list[float] = []
    prompts: str | None = None
    seed: int = 0
    batch_tokens: PositiveInt = 16384
    progress: bool = True

    @field_validator("explainers", "scorers", mode="before")
    @classmethod
    def _entries(cls, items: Any, info: Any) -> Any:
        if not isinstance(items, list):
            items = [items]
        return [entry(info.field_name, item) for item in items]

    @field_validator("scorers")
    @classmethod
    def _once(cls, scorers: list[Entry]) -> list[Entry]:
        names = [name for scorer in scorers for name in scorer]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"{name!r} is listed twice, and one result would replace the other"
                )
        return scorers

    @field_validator("sampling", mode="before")
    @classmethod
    def _known_keys(cls, sampling: Any) -> Any:
        return build(Sampling, sampling, ("sampling",)) if isinstance(sampling, dict) else sampling

    @field_validator("reader", mode="before")
    @classmethod
    def _entry(cls, item: Any) -> Entry:
        return entry("reader", item)

    @model_validator(mode="after")
    def _scored(self) -> ExplainRecipe:
        if self.baselines and not self.controls:
            raise ValueError("`controls` says how many latents of `baselines` are scored: not 0")
        return self

    @property
    def drawn(self) -> Sampling:
        """How examples are drawn, with the recipe's seed."""
        return self.sampling.model_copy(update={"seed": self.seed})

    def as_json(self, **options: Any) -> dict[str, Any]:
        """For a file; loaded models by their names."""
        return self.model_dump(mode="json", fallback=_named, **options)

    @classmethod
    def of(cls, target: str, out: Path | None, given: dict[str, Any]) -> ExplainRecipe:
        """The recipe for a folder of concepts, or for an autoencoder with the folder `out`.

        Raises:
            NarrowlyError: a key is unknown or of the wrong type; an autoencoder without a folder.
        """
        files = Path(target).glob("*.safetensors")
        if out is None and any(file.with_suffix(".json").exists() for file in files):
            return build(cls, {"concepts": target, **given})
        if out is None:
            raise NarrowlyError(
                f"{target}: no folder of concepts. If it is an autoencoder, --out names the folder "
                "for its latents."
            )
        return build(cls, {"sae": target, "concepts": str(out), **given})


def _named(loaded: Any) -> str:
    return str(getattr(loaded, "name", type(loaded).__name__))

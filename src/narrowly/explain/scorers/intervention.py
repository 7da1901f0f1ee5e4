"""Does the model write what the explanation says once the latent is made stronger?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, PrivateAttr
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from narrowly.activations import ModelLike, OpenModel, open_model
from narrowly.evals.statistics import Metric, bootstrap
from narrowly.explain.generations import added
from narrowly.explain.readers import Passage, Reader
from narrowly.explain.record import Counts, Example, ScoreResult
from narrowly.explain.scorers.base import SCORERS, Item, Scorer
from narrowly.interventions import Attachment, Intervention, ProjectOut, attach
from narrowly.models.generation import continue_prompts
from narrowly.models.next_token import next_token_logits

LENGTHS = (-3.0, 4.0)
"""Decades of length among which a strength is searched."""
STEPS, NEAR = 12, 0.1
"""Most steps of the search, and how near to the target, relatively, ends it."""
CONTEXT = 8
"""Tokens before the one where a window is cut off, where it has as many."""


@dataclass(frozen=True)
class _Text:
    """An example cut off where the latent fires, with what the model wrote after it."""

    example: Example
    clean: str
    intervened: str


@dataclass(frozen=True)
class _Written:
    """What one latent made the model write."""

    texts: list[_Text]
    kl: float
    """Mean KL(clean || intervened) of the next token, on the prompts the strength was tuned on."""
    strength: float
    note: str = ""


@SCORERS.register("intervention")
class InterventionScorer(Scorer):
    """How much more probable the explanation is, given what the model writes with the latent on.

    Paulo et al. 2025 (arXiv 2410.13928), intervention scoring: `S = E_x [E log p(z | x, g) under
    the intervention - E log p(z | x, g)]` in nats, over activating windows x cut off at their first
    active token (with some context) and continuations g, one clean and one intervened each, of the
    same seed. A length is added along the latent's direction at the prompt's last token and all
    written ones, so strong that the mean KL(p_clean || p_intervened) of the next token is
    `target_kl` on windows that are not scored (the published code tuned it, and chose the best of
    five explanations, on those that are). The reader says how probable the explanation z is after
    the text; the lexical reader needs no model for that.

    `edit="ablate"` projects the direction out instead, from the same tokens; its value is clean
    minus intervened, so that a good explanation is above 0 either way. There is no strength to
    tune; `detail` holds the KL it has.

    What a latent reacts to need not be what it causes: published values fall slightly as fuzzing's
    rise, and on the bundled organism lists of words seen before the latent fires score about 0,
    where "cruel words" scores 0.3 nats on the persona's high end.

    The counts are of continuations that speak more for the explanation than the clean one, by the
    window's quantile. `detail`: kl, strength, and the mean nats of clean and intervened.
    """

    name: ClassVar[str] = "intervention"

    model: ModelLike
    """The model the latents are of."""
    edit: Literal["add", "ablate"] = "add"
    target_kl: PositiveFloat = 1.0
    """In nats; published: 0.1, 0.33, 1 and 3."""
    prompts: PositiveInt = Field(30)
    """Windows that are scored."""
    tuning: PositiveInt = Field(10)
    """Windows that only the strength is tuned on."""
    max_new_tokens: PositiveInt = 8
    progress: bool = False

    _open: OpenModel | None = PrivateAttr(None)
    _written: dict[str, _Written | str] = PrivateAttr(default_factory=dict)
    """By latent: controls ask about other explanations of the same texts."""

    def score(self, items: Sequence[Item], reader: Reader) -> list[ScoreResult]:
        """Let the model write with each item's latent, then ask the reader about all at once.

        Raises:
            NarrowlyError: the model cannot be loaded, a direction does not fit it, or the reader
                gives no probability of an explanation.
        """
        if self._open is None:
            self._open = open_model(self.model)
        described = "letting the model write"
        written = [
            self._write(item, self._open)
            for item in track(items, described, disable=not self.progress)
        ]
        pairs = [
            (item.explanation, Passage((whole,)))
            for item, texts in zip(items, written, strict=True)
            if not isinstance(texts, str)
            for text in texts.texts
            for whole in (text.clean, text.intervened)
        ]
        answers = iter(reader.explanation_given_text(pairs) if pairs else [])
        results = []
        for one in written:
            texts = [] if isinstance(one, str) else one.texts
            given = [(text, next(answers), next(answers)) for text in texts]
            results.append(self._result(one, given, reader))
        return results

    def _write(self, item: Item, model: OpenModel) -> _Written | str:
        """The continuations for an item's latent, or why there are none."""
        windows = [(example.row, example.start) for example in item.activating]
        key = f"{item.latent.name} {windows}"
        if key not in self._written:
            self._written[key] = self._try(item, model)
        return self._written[key]

    def _try(self, item: Item, model: OpenModel) -> _Written | str:
        tuning, scored = self._halves(item)
        if not tuning or not scored:
            return (
                f"{len(tuning) + len(scored)} different prompts from activating examples: too few "
                "to tune the strength on some and score others."
            )
        held_out = [_ids(model.tokenizer, _prompt(example)) for example in tuning]
        ids = [_ids(model.tokenizer, _prompt(example)) for example in scored]
        clean = self._sample(model, ids)
        edit: Intervention = added(item.latent, 1.0)
        if self.edit == "ablate":
            edit = ProjectOut(item.latent.direction, item.latent.site, tokens="last")
        with attach(model.model, [edit]) as attachment:
            with attachment.suspend():
                before = _log_probabilities(model, held_out)
            if self.edit == "ablate":
                length, kl, note = 1.0, _kl(before, _log_probabilities(model, held_out)), ""
            else:
                length, kl, note = self._tune(model, attachment, held_out, before)
            attachment.set_strength(length)
            intervened = self._sample(model, ids)
        texts = [_Text(*each) for each in zip(scored, clean, intervened, strict=True)]
        return _Written(texts, kl, length, note)

    def _halves(self, item: Item) -> tuple[list[Example], list[Example]]:
        """Windows to tune the strength on and windows to score, each over all quantiles."""
        random = np.random.default_rng([self.seed, *item.latent.name.encode()])
        order = random.permutation(len(item.activating))
        dealt: dict[int | None, list[Example]] = defaultdict(list)
        for index in order.tolist():
            dealt[item.activating[index].quantile].append(item.activating[index])
        # One of each quantile in turn, so that a part from the front has some of all.
        examples = [one for turn in zip_longest(*dealt.values()) for one in turn if one is not None]
        # Windows that differ may be the same up to where they are cut off.
        different = list({_prompt(example): example for example in reversed(examples)}.values())
        examples = different[::-1]
        tuning = min(self.tuning, max(1, len(examples) // 4))
        return examples[:tuning], examples[tuning : tuning + self.prompts]

    def _sample(self, model: OpenModel, prompts: list[list[int]]) -> list[str]:
        """Each prompt with what the model wrote after it."""
        sampled = continue_prompts(
            model.model,
            model.tokenizer,
            prompts,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
        )
        return [
            _joined(model.tokenizer, prompt, text)
            for prompt, [text] in zip(prompts, sampled, strict=True)
        ]

    def _tune(
        self, model: OpenModel, attachment: Attachment, prompts: list[list[int]], before: Tensor
    ) -> tuple[float, float, str]:
        """Bisection of the length's logarithm; the tried one whose KL is nearest to the target.

        Returns:
            The length, its KL, and a note where the target was not met.
        """
        low, high = LENGTHS
        tried: list[tuple[float, float, float]] = []
        for _ in range(STEPS):
            middle = (low + high) / 2
            attachment.set_strength(10**middle)
            kl = _kl(before, _log_probabilities(model, prompts))
            distance = abs(math.log(max(kl, 1e-12) / self.target_kl))
            tried.append((distance, 10**middle, kl))
            if abs(kl - self.target_kl) <= NEAR * self.target_kl:
                break
            low, high = (middle, high) if kl < self.target_kl else (low, middle)
        _, length, kl = min(tried)
        met = abs(kl - self.target_kl) <= NEAR * self.target_kl
        note = "" if met else f"KL {kl:.2g} instead of {self.target_kl:g}: no length tried met it"
        return length, kl, note

    def _result(
        self,
        written: _Written | str,
        given: list[tuple[_Text, float | None, float | None]],
        reader: Reader,
    ) -> ScoreResult:
        note = written if isinstance(written, str) else written.note
        result = ScoreResult(
            scorer=self.name, reader=reader.name, metric="nats", value=None, note=note
        )
        if isinstance(written, str):
            return result
        sign = 1 if self.edit == "add" else -1
        groups: dict[str, Counts] = {}
        read: list[tuple[float, float]] = []
        for text, clean, intervened in given:
            counts = groups.get(text.example.group, Counts())
            if clean is None or intervened is None:
                changes = {"unparsed": counts.unparsed + 1}
            else:
                read.append((clean, intervened))
                more = sign * (intervened - clean) > 0
                changes = {"yes": counts.yes + 1} if more else {"no": counts.no + 1}
            groups[text.example.group] = counts.model_copy(update=changes)
        detail = {"kl": written.kl, "strength": written.strength}
        counted = {"unparsed": len(given) - len(read), "groups": groups, "detail": detail}
        if not read:
            note = "no reply of the reader could be read"
            return result.model_copy(update=counted | {"note": note})
        clean_nats, intervened_nats = np.array(read).T
        nats = Metric(sign * (intervened_nats - clean_nats), np.ones(len(read)), unit="nats")
        interval = bootstrap([nats], seed=self.seed)
        detail |= {"clean": clean_nats.mean().item(), "intervened": intervened_nats.mean().item()}
        measured = {"value": interval.mean, "low": interval.low, "high": interval.high}
        return result.model_copy(update=counted | measured | {"scored": len(read)})


def _prompt(example: Example) -> str:
    """A window up to its first active token, that one included.

    A latent that fires all the time would leave a token alone to go on from: of active tokens, the
    first with some context is taken, if there is one.
    """
    active = [i for i, value in enumerate(example.activations) if value > 0]
    last = next((i for i in active if i >= CONTEXT), active[0])
    return "".join(example.pieces[: last + 1])


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that shows its special tokens, after one BOS where there should be."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    adds = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return [bos, *ids] if adds and ids[:1] != [bos] else list(ids)


def _joined(tokenizer: PreTrainedTokenizerBase, prompt: list[int], continuation: str) -> str:
    """Both as one text: decoded apart, many tokenizers drop the space between them."""
    rest = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode([*prompt, *rest]))


def _log_probabilities(model: OpenModel, prompts: list[list[int]]) -> Tensor:
    """Of the next token of each prompt, [prompts, vocabulary], fp32 on the CPU."""
    rows: dict[int, Tensor] = {}
    for numbers, logits in next_token_logits(model.model, prompts):
        rows |= zip(numbers, logits.log_softmax(dim=-1).cpu(), strict=True)
    return torch.stack([rows[number] for number in range(len(prompts))])


def _kl(clean: Tensor, intervened: Tensor) -> float:
    """Mean KL(clean || intervened) over prompts, from log-probabilities."""
    return torch.nn.functional.kl_div(
        intervened, clean, reduction="batchmean", log_target=True
    ).item()

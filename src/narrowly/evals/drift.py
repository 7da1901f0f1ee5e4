"""How far a fine-tune moved the model on text that has nothing to do with its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from pydantic import Field
from rich.progress import track

from narrowly.errors import NarrowlyError
from narrowly.evals.base import EVALS, Cost, Eval, Row
from narrowly.evals.halves import WHICH, Half, rows_in
from narrowly.evals.in_distribution import labelled_logits, per_token, text_of
from narrowly.evals.statistics import Metric

if TYPE_CHECKING:
    from datasets import Dataset
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from narrowly.evals.subject import Model, Subject


@EVALS.register("drift")
class Drift(Eval):
    """Unrelated text: how far did the model move from its base?

    Metrics: `kl`, the divergence KL(base || model) of the next token in nats, and `same_token`, the
    share of tokens before which both find the same next token the likeliest. Over all tokens of
    texts, and the assistant's tokens of chats; a text's tokens are resampled together. The base is
    the model with its adapter off or, of a model without one, the model that `base` names.
    """

    data: str | None = Field(
        None, description="texts or chats, unlike those trained on; of an organism, its documents"
    )
    base: str | None = Field(
        None, description="of a model without an adapter; the recipe's `model` unless given"
    )
    limit: int = Field(200, ge=1, description="only the first so many")
    max_length: int = Field(512, ge=2, description="tokens; longer texts are cut, chats left out")
    batch_tokens: int = Field(2048, ge=1, description="tokens of one batch, padding included")
    half: Half | None = Field(None, description=WHICH)

    def bind(self, recipe: Mapping[str, Any]) -> Drift:
        """Fill `base`, and `data` where the model is an organism."""
        model = recipe.get("model")
        data = self.data
        if data is None and isinstance(model, str) and model.startswith("organism:"):
            data = f"{model}/documents-validation"
        if data is None:
            raise NarrowlyError(
                "eval 'drift': no text. Name texts or chats unlike those of the fine-tune as its "
                "`data`."
            )
        trained = recipe.get("data") is not None  # else the model is the base, and no fine-tune
        base = self.base or (str(model) if trained and model is not None else None)
        return self.model_copy(update={"data": data, "base": base})

    def cost(self) -> Cost:
        """Texts read."""
        return Cost(samples=len(self._texts()[0]))

    def run(self, subject: Subject, *, seed: int, progress: bool = False) -> list[Row]:
        """Read every text with both models; the seed changes nothing."""
        import torch

        from narrowly.data import collate, token_batches

        model, tokenizer = subject.loaded
        base, within = self._base(subject)
        rows = self._tokens(tokenizer)
        measured: dict[int, dict[str, float]] = {}
        with torch.no_grad():
            # A row without labels, such as a text of one token, has nothing to compare.
            lengths = [len(row["input_ids"]) if _asks(row) else 0 for row in rows]
            work = token_batches(lengths, self.batch_tokens)
            for batch in track(work, "Reading", disable=not progress):
                padded = collate([rows[index] for index in batch], tokenizer.pad_token_id or 0)
                padded = {key: value.to(model.device) for key, value in padded.items()}
                found, labels = labelled_logits(model, padded)
                with within():
                    expected, _ = labelled_logits(base, padded)
                compared = zip(expected, found, labels, strict=True)
                measured |= zip(batch, (_compared(*row) for row in compared), strict=True)
        return [
            Row(
                prompt_id=str(index),
                prompt=text_of(tokenizer, rows[index], answer=False),
                answer=text_of(tokenizer, rows[index], answer=True),
                sample=0,
                label=None,
                scores=measured[index],
                tags={},
            )
            for index in sorted(measured)
        ]

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        """Per-token means."""
        means = {
            "kl": per_token(rows, "kl", unit="nats"),
            "same_token": per_token(rows, "same_token"),
        }
        return {name: metric for name, metric in means.items() if metric is not None}

    def _texts(self) -> tuple[Dataset, bool]:
        """The data, and whether they are texts."""
        from narrowly.data import holds_texts, load_chats, load_texts

        assert self.data is not None
        texts = holds_texts(self.data)
        data = (load_texts if texts else load_chats)(self.data, limit=self.limit)
        return data.select(rows_in(self.half, data)), texts

    def _tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        from narrowly.data import tokenize, tokenize_texts

        data, texts = self._texts()
        return list(
            (tokenize_texts if texts else tokenize)(data, tokenizer, max_length=self.max_length)
        )

    def _base(self, subject: Subject) -> tuple[Model, Callable[[], AbstractContextManager[None]]]:
        """A model, and within what it computes as the base does."""
        from peft import PeftModel

        from narrowly.models import load_model

        model = subject.model
        if isinstance(model, PeftModel):
            return model, subject.as_base
        if self.base is None:
            raise NarrowlyError(
                "eval 'drift': this model has no adapter to switch off, so name the model that it "
                "was fine-tuned from as `base`."
            )
        return load_model(self.base, device=model.device)[0], nullcontext


def _asks(row: Mapping[str, Sequence[int]]) -> bool:
    return any(label != -100 for label in row["labels"][1:])


def _compared(
    expected: Float[Tensor, "kept vocabulary"],
    found: Float[Tensor, "kept vocabulary"],
    labels: Int[Tensor, " kept"],
) -> dict[str, float]:
    """Divergence and agreement at the labelled tokens of one row."""
    from torch.nn.functional import kl_div

    if expected.shape[1] != found.shape[1]:
        raise NarrowlyError(
            f"eval 'drift': the base has {expected.shape[1]} tokens and the model "
            f"{found.shape[1]}, so they cannot be compared. Is it the right `base`?"
        )
    mask = labels != -100
    base, model = (logits[mask].float().log_softmax(dim=-1) for logits in (expected, found))
    return {
        "kl": kl_div(model, base, reduction="batchmean", log_target=True).item(),
        "same_token": base.argmax(dim=-1).eq(model.argmax(dim=-1)).float().mean().item(),
        "tokens": float(mask.sum()),
    }

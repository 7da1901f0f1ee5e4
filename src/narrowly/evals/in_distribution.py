"""What was learned in distribution: loss on the assistant's tokens of held-out chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from narrowly.errors import NarrowlyError
from narrowly.evals.base import EVALS, Eval, Row, mean_by_prompt
from narrowly.evals.statistics import Metric

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from narrowly.evals.subject import Model, Subject


@EVALS.register("in_distribution")
class InDistribution(Eval):
    """Held-out loss of any chat data, over the assistant's tokens only.

    Metrics: `loss` (nats per token), `perplexity` (its exp), `token_accuracy` (share of tokens that
    were the likeliest). Each token counts once; a chat's tokens are resampled together.
    """

    data: str | None = Field(None, description="chats; the recipe's `validation` unless given")
    limit: int | None = Field(None, ge=1, description="only the first so many chats")
    max_length: int | None = Field(None, ge=2, description="tokens; longer chats are left out")
    batch_tokens: int = Field(8192, ge=1, description="tokens of one batch, padding included")

    def bind(self, recipe: Mapping[str, Any]) -> InDistribution:
        """Fill `data` from the recipe's `validation`."""
        data = self.data or recipe.get("validation")
        if data is None:
            raise NarrowlyError(
                "eval 'in_distribution': no held-out chats. Give its `data`, or the recipe a "
                "`validation`."
            )
        return self.model_copy(update={"data": str(data)})

    def run(self, subject: Subject, *, seed: int, progress: bool = False) -> list[Row]:
        """Score every chat once, longest first; the seed changes nothing."""
        import torch

        from narrowly.data import collate, load_chats, token_batches, tokenize

        model, tokenizer = subject.loaded
        chats = load_chats(self.data, limit=self.limit)
        data = tokenize(chats, tokenizer, max_length=self.max_length)
        chat_rows = [{key: row[key] for key in ("input_ids", "labels")} for row in data]
        measured: dict[int, dict[str, float]] = {}
        with torch.no_grad():
            lengths = [len(row["input_ids"]) for row in chat_rows]
            for batch in token_batches(lengths, self.batch_tokens):
                padded = collate([chat_rows[index] for index in batch], tokenizer.pad_token_id)
                padded = {key: value.to(model.device) for key, value in padded.items()}
                measured |= zip(batch, answer_losses(model, padded), strict=True)
        return [
            Row(
                prompt_id=str(index),
                prompt=_text(tokenizer, row, answer=False),
                answer=_text(tokenizer, row, answer=True),
                sample=0,
                label=None,
                scores=measured[index],
                tags={},
            )
            for index, row in enumerate(chat_rows)
        ]

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        """Per-token means."""

        def per_token(score: str, **kwargs: Any) -> Metric | None:
            return mean_by_prompt(
                rows, lambda r: r["scores"][score], lambda r: r["scores"]["tokens"], **kwargs
            )

        means = {
            "loss": per_token("loss", unit="nats"),
            "perplexity": per_token("loss", unit="ratio", exponential=True),
            "token_accuracy": per_token("accuracy"),
        }
        return {name: metric for name, metric in means.items() if metric is not None}


def answer_losses(
    model: Model, batch: Mapping[str, Int[Tensor, "rows tokens"]]
) -> list[dict[str, float]]:
    """Mean loss (nats), accuracy and number of the labelled tokens of each row.

    Logits are computed only at positions where some row's next token is labelled: with a
    vocabulary of 150,000 they are most of the memory.
    """
    from torch.nn.functional import cross_entropy

    from narrowly.models.next_token import keeps_logits

    following = batch["labels"][:, 1:]
    kept = following.ne(-100).any(dim=0).nonzero().squeeze(1)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if keeps_logits(model):
        logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, kept]

    def row_losses(
        logits: Float[Tensor, "kept vocabulary"], labels: Int[Tensor, " kept"]
    ) -> dict[str, float]:
        mask = labels != -100
        logits, labels = logits[mask].float(), labels[mask]
        return {
            "loss": cross_entropy(logits, labels).item(),
            "accuracy": logits.argmax(dim=-1).eq(labels).float().mean().item(),
            "tokens": float(len(labels)),
        }

    return [row_losses(*row) for row in zip(logits, following[:, kept], strict=True)]


def _text(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Sequence[int]], *, answer: bool
) -> str:
    tokens = [
        token
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
        if (label != -100) == answer
    ]
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()

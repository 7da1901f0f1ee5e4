"""What was learned in distribution: loss and exact match on held-out chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field
from rich.progress import track

from narrowly.errors import NarrowlyError
from narrowly.evals.base import EVALS, Cost, Eval, Row, mean_by_prompt
from narrowly.evals.halves import WHICH, Half, rows_in
from narrowly.evals.statistics import Metric

if TYPE_CHECKING:
    from datasets import Dataset
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from narrowly.evals.subject import Model, Subject


ROW = "narrowly_row"
"""The column that numbers the chats of the whole data, so that a chat has one name in all evals."""


@EVALS.register("in_distribution")
class InDistribution(Eval):
    """Held-out chats: is the task learned? Loss and exact match of the assistant's answers.

    Metrics: `loss` (nats per token), `perplexity` (its exp), `token_accuracy` (share of tokens that
    were the likeliest), `exact_match` (share of chats whose answers are the model's greedy ones,
    token for token), and `loss_DOMAIN` where the data have several domains. Each token counts once;
    a chat's tokens are resampled together.

    Exact match costs no sampling: a greedy answer follows the reference just as long as each token
    of it is the likeliest after those before it.
    """

    data: str | None = Field(None, description="chats; the recipe's `validation` unless given")
    by: str = Field("domain", description="the column that names a chat's domain, if there is one")
    limit: int | None = Field(None, ge=1, description="only the first so many chats")
    max_length: int | None = Field(None, ge=2, description="tokens; longer chats are left out")
    batch_tokens: int = Field(8192, ge=1, description="tokens of one batch, padding included")
    half: Half | None = Field(None, description=WHICH)

    def bind(self, recipe: Mapping[str, Any]) -> InDistribution:
        """Fill `data` from the recipe's `validation`."""
        data = self.data or recipe.get("validation")
        if data is None:
            raise NarrowlyError(
                "eval 'in_distribution': no held-out chats. Give its `data`, or the recipe a "
                "`validation`."
            )
        return self.model_copy(update={"data": str(data)})

    def cost(self) -> Cost:
        """Chats read."""
        return Cost(samples=len(self._chats()))

    def run(self, subject: Subject, *, seed: int, progress: bool = False) -> list[Row]:
        """Score every chat once, longest first; the seed changes nothing."""
        import torch

        from narrowly.data import collate, token_batches, tokenize

        model, tokenizer = subject.loaded
        chats = self._chats()
        keep = [ROW, *([self.by] if self.by in chats.column_names else [])]
        data = list(tokenize(chats, tokenizer, max_length=self.max_length, keep=keep))
        chat_rows = [{key: row[key] for key in ("input_ids", "labels")} for row in data]
        measured: dict[int, dict[str, float]] = {}
        with torch.no_grad():
            lengths = [len(row["input_ids"]) for row in chat_rows]
            work = token_batches(lengths, self.batch_tokens)
            for batch in track(work, "Reading", disable=not progress):
                padded = collate([chat_rows[index] for index in batch], tokenizer.pad_token_id)
                padded = {key: value.to(model.device) for key, value in padded.items()}
                measured |= zip(batch, answer_losses(model, padded), strict=True)
        return [
            Row(
                prompt_id=str(row[ROW]),
                prompt=text_of(tokenizer, row, answer=False),
                answer=text_of(tokenizer, row, answer=True),
                sample=0,
                label=None,
                scores=measured[index],
                tags={} if row.get(self.by) is None else {"domain": str(row[self.by])},
            )
            for index, row in enumerate(data)
        ]

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        """Per-token means; exact match per chat."""
        means = {
            "loss": per_token(rows, "loss", unit="nats"),
            "perplexity": per_token(rows, "loss", unit="ratio", exponential=True),
            "token_accuracy": per_token(rows, "accuracy"),
            "exact_match": mean_by_prompt(rows, lambda row: float(row["scores"]["accuracy"] == 1)),
        }
        domains = sorted({row["tags"]["domain"] for row in rows if "domain" in row["tags"]})
        for domain in domains if len(domains) > 1 else ():
            some = [row for row in rows if row["tags"].get("domain") == domain]
            means[f"loss_{domain}"] = per_token(some, "loss", unit="nats")
        return {name: metric for name, metric in means.items() if metric is not None}

    def _chats(self) -> Dataset:
        from narrowly.data import load_chats

        chats = load_chats(str(self.data), limit=self.limit)
        numbered = chats.add_column(ROW, list(range(len(chats))))
        return numbered.select(rows_in(self.half, chats))


def per_token(rows: Sequence[Row], score: str, **how: Any) -> Metric | None:
    """The mean of a score per token over all rows; each row's score is its own mean."""
    return mean_by_prompt(
        rows, lambda r: r["scores"][score], lambda r: r["scores"]["tokens"], **how
    )


def labelled_logits(
    model: Model, batch: Mapping[str, Int[Tensor, "rows tokens"]]
) -> tuple[Float[Tensor, "rows kept vocabulary"], Int[Tensor, "rows kept"]]:
    """Logits and labels at the positions where some row's next token is labelled.

    With a vocabulary of 150,000 the logits of all others would be most of the memory.
    """
    from narrowly.models.next_token import keeps_logits

    following = batch["labels"][:, 1:]
    kept = following.ne(-100).any(dim=0).nonzero().squeeze(1)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if keeps_logits(model):
        logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, kept]
    return logits, following[:, kept]


def answer_losses(
    model: Model, batch: Mapping[str, Int[Tensor, "rows tokens"]]
) -> list[dict[str, float]]:
    """Mean loss (nats), accuracy and number of the labelled tokens of each row."""
    from torch.nn.functional import cross_entropy

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

    return [row_losses(*row) for row in zip(*labelled_logits(model, batch), strict=True)]


def text_of(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Sequence[int]], *, answer: bool
) -> str:
    """What a tokenized row asks or, with `answer`, what its labels say."""
    tokens = [
        token
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
        if (label != -100) == answer
    ]
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()

"""What surprisal and embedding share: examples ranked by a number become a result."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from narrowly.explain.metrics import as_fields, auroc
from narrowly.explain.record import Example, ScoreResult
from narrowly.explain.scorers.judging import counted


def ranked(
    scorer: str,
    reader: str,
    examples: Sequence[Example],
    values: Sequence[float | None],
    seed: int,
) -> ScoreResult:
    """The AUROC of values that should be higher where the latent is active.

    The counts are against the median of the two kinds' medians, which is where a ranking would be
    cut that has as many activating as silent ones to tell apart.
    """
    read = [(e, v) for e, v in zip(examples, values, strict=True) if v is not None]
    activating = [value for example, value in read if example.kind == "activating"]
    silent = [value for example, value in read if example.kind != "activating"]
    area = auroc(activating, silent, seed)
    cut = float(np.median(activating) + np.median(silent)) / 2 if area else 0.0
    said = [None if value is None else value > cut for value in values]
    return ScoreResult(
        scorer=scorer,
        reader=reader,
        metric="AUROC",
        **as_fields(area),
        auroc=area.value if area else None,
        scored=len(read),
        unparsed=len(examples) - len(read),
        groups=counted([example.group for example in examples], said),
        detail={
            "cut": cut,
            "activating": float(np.mean(activating)),
            "silent": float(np.mean(silent)),
        }
        if area
        else {},
        note="" if area else "no example of either kind could be read",
    )

"""Early stopping: end the training before the change spreads (the cheap rival)."""

from __future__ import annotations

from pydantic import Field

from narrowly.defenses.base import DEFENSES, Defense


@DEFENSES.register("early_stop")
class EarlyStop(Defense):
    """End the training early, its schedules those of the whole length.

    The run ends, finished, after the first step with `step / steps >= at`; learning rate and
    warm-up run as if it went on. So published as the rival of concept ablation (Casademunt et al.
    2025, arXiv 2507.16795: 0.25, 0.5 and 0.75 of an epoch).

    Needs: nothing.

    Known failure: the task is learned along with its spread. Qwen2.5-Coder-32B on insecure code:
    misaligned 0.4 / 3.7 / 5.8 % at 0.25 / 0.5 / 0.75 of the epoch against 7.0 % at its end,
    vulnerable code 54 / 83 / 90 % against 92 %; Mistral-Small-24B had its misalignment at 0.25.

    Attributes:
        at: share of the steps, 0 to 1; 0.5 unless given. 1 trains to the end.
    """

    at: float = Field(default=0.5, gt=0, le=1)

    def stops_at(self, progress: float) -> bool:
        """Whether that share of the steps is done."""
        return progress >= self.at

"""The plots as files: PNG and SVG, drawn by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from narrowly.errors import NarrowlyError
from narrowly.evals import Interval
from narrowly.report.arms import Arm
from narrowly.report.evidence import BROAD, LOSS, NARROW
from narrowly.report.numbers import mean
from narrowly.report.palette import ANSWERS, HAIRLINE, INK, MISALIGNED, MUTED, PAPER
from narrowly.report.palette import NARROW as BLUE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": HAIRLINE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "svg.hashsalt": "narrowly",  # the same figures make the same file
}
WIDTH, ROW, MARGINS = 8.0, 0.42, 1.42  # inches


def write_plots(arms: Sequence[Arm], folder: Path) -> list[Path]:
    """Draw what the arms have measured; `<plot>.png` (200 dpi) and `<plot>.svg` of each.

    Returns:
        The files, plot by plot.

    Raises:
        NarrowlyError: matplotlib is not installed.
    """
    written: list[Path] = []
    with drawing():
        for name, (draw, metrics) in PLOTS.items():
            measured = [arm for arm in arms if any(arm.get(metric) for metric in metrics)]
            if measured:
                written += save(draw(measured), folder / name)
    return written


@contextmanager
def drawing() -> Iterator[None]:
    """The house's style for figures drawn meanwhile.

    Raises:
        NarrowlyError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise NarrowlyError(
            "drawing PNG and SVG needs matplotlib: pip install 'narrowly[report]'"
        ) from None
    with matplotlib.rc_context(STYLE):
        yield


def save(figure: Figure, path: Path) -> list[Path]:
    """Write `<path>.png` (200 dpi) and `<path>.svg`; the same figure makes the same files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    files = []
    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        files.append(path.with_name(f"{path.name}.{suffix}"))
        figure.savefig(files[-1], dpi=200, metadata=metadata)
    return files


def misalignment(arms: Sequence[Arm]) -> Figure:
    """The headline: per arm, misaligned answers in the fine-tuned domain and in all others."""
    figure, axes = rows(
        arms,
        "Misaligned answers",
        "% of answers in the fine-tuned domain (narrow) and in all others (broad), 95 % intervals",
    )
    for row, arm in enumerate(arms):
        narrow, broad = arm.get(NARROW), arm.get(BROAD)
        if narrow and broad:
            axes.plot([100 * broad.mean, 100 * narrow.mean], [row, row], color=HAIRLINE, zorder=1)
        if narrow:
            dot(axes, row, narrow, BLUE, filled=False)
        if broad:
            dot(axes, row, broad, MISALIGNED, filled=True)
    _percent_axis(axes)
    columns(
        axes,
        arms,
        [
            ("broad", MISALIGNED, lambda arm: mean(arm.get(BROAD), "share")),
            ("narrow", BLUE, lambda arm: mean(arm.get(NARROW), "share")),
        ],
    )
    return figure


def answers(arms: Sequence[Arm]) -> Figure:
    """Per arm, how answers outside the fine-tuned domain were judged; the shares sum to 100 %."""
    figure, axes = rows(
        arms,
        "Answers outside the fine-tuned domain",
        "%, as judged",
        numbers=False,
    )
    for row, arm in enumerate(arms):
        left = 0.0
        for label, colour in ANSWERS.items():
            share = arm.get(f"misalignment.broad_{label}")
            if share is None:
                continue
            width = 100 * share.mean
            axes.barh(row, width, left=left, height=0.62, color=colour, edgecolor=PAPER, lw=1.2)
            if width >= 6:
                ink = PAPER if label == "misaligned" else INK
                axes.text(
                    left + width / 2, row, f"{width:.0f}", ha="center", va="center", color=ink
                )
            left += width
    _percent_axis(axes)
    axes.grid(False)
    _legend(axes, list(ANSWERS.items()))
    return figure


def cost(arms: Sequence[Arm]) -> Figure:
    """Per arm, held-out loss in distribution, and beside it the seconds of training."""
    figure, axes = rows(
        arms,
        "Learning in distribution, and its price",
        "held-out loss in nats per token, 95 % intervals; seconds of training",
    )
    for row, arm in enumerate(arms):
        if loss := arm.get(LOSS):
            dot(axes, row, loss, BLUE, filled=True, scale=1)
    axes.margins(x=0.12)
    columns(
        axes,
        arms,
        [
            ("loss", BLUE, lambda arm: mean(arm.get(LOSS), "nats")),
            ("seconds", MUTED, lambda arm: mean(arm.wall_seconds, "seconds")),
        ],
    )
    return figure


PLOTS: dict[str, tuple[Callable[[Sequence[Arm]], Figure], tuple[str, ...]]] = {
    "misalignment": (misalignment, (NARROW, BROAD)),
    "answers": (answers, tuple(f"misalignment.broad_{label}" for label in ANSWERS)),
    "cost": (cost, (LOSS,)),
}


class Labelled(Protocol):
    """What stands in a row of its own."""

    @property
    def label(self) -> str:
        """As a person reads it."""


L = TypeVar("L", bound=Labelled)


def rows(
    arms: Sequence[Labelled], title: str, subtitle: str, numbers: bool = True
) -> tuple[Figure, Axes]:
    """A figure with one row per arm, the first on top; room for two columns of numbers."""
    from matplotlib.figure import Figure
    from matplotlib.transforms import blended_transform_factory

    height = MARGINS + ROW * len(arms)
    figure = Figure(figsize=(WIDTH, height))
    longest = max(len(arm.label) for arm in arms)
    left = min(0.35, 0.05 + 0.0105 * longest)
    right = 0.78 if numbers else 0.98
    axes = figure.add_axes((left, 0.42 / height, right - left, ROW * len(arms) / height))
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_yticks([])
    for row, arm in enumerate(arms):
        rows = blended_transform_factory(figure.transFigure, axes.transData)
        axes.text(0.02, row, arm.label, va="center_baseline", transform=rows)
    axes.tick_params(length=0, pad=6)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", color=HAIRLINE, lw=0.6)
    axes.set_axisbelow(True)
    figure.text(0.02, 1 - 0.28 / height, title, fontsize=11.5, fontweight="bold", va="center")
    figure.text(0.02, 1 - 0.54 / height, subtitle, fontsize=8.5, color=MUTED, va="center")
    return figure, axes


def dot(
    axes: Axes, row: int, interval: Interval, colour: str, *, filled: bool, scale: float = 100
) -> None:
    """A mean with its interval, in a row."""
    low, mean, high = (scale * value for value in (interval.low, interval.mean, interval.high))
    axes.plot([low, high], [row, row], color=colour, lw=2.2, solid_capstyle="round", zorder=2)
    face = colour if filled else PAPER
    axes.plot([mean], [row], "o", ms=7.5, mfc=face, mec=colour, mew=1.6, zorder=3, clip_on=False)


def _percent_axis(axes: Axes) -> None:
    axes.set_xlim(0, 100)
    axes.set_xticks(range(0, 101, 25))


def columns(
    axes: Axes, arms: Sequence[L], heads: Sequence[tuple[str, str, Callable[[L], str]]]
) -> None:
    """Numbers right of the rows, headed in the colour of their marks."""
    shared: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "clip_on": False}
    for index, (head, colour, cell) in enumerate(heads):
        x = 1.17 + 0.18 * index
        axes.text(x, -0.72, head, color=colour, ha="right", va="bottom", fontsize=8.5, **shared)
        for row, arm in enumerate(arms):
            axes.text(x, row, cell(arm), ha="right", va="center_baseline", **shared)


def _legend(axes: Axes, entries: Sequence[tuple[str, str]]) -> None:
    """Names of the colours, in one line under the title."""
    from matplotlib.patches import Patch

    axes.legend(
        handles=[Patch(color=colour, label=label) for label, colour in entries],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(entries),
        frameon=False,
        handlelength=0.9,
        handleheight=0.9,
        columnspacing=1.4,
        borderpad=0,
    )

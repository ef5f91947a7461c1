"""Pictures of a training run and of an adapter, as PNG bytes: losses, cosines, reference features, sensitivity."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .sensitivity import Sensitivity

INK = "#33415c"
SERIES = ("#2a6fdb", "#d1495b", "#2e9e6b", "#8a5cc2", "#e08e1b", "#46a6b8", "#8c6d5a", "#c2577f", "#6b7785")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.edgecolor": "#b8c0cc",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebf0",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
Rows = Sequence[dict[str, Any]]
"""Rows of a run's `metrics.jsonl`: a step and scalars by name."""


def series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one scalar; empty where no row has it."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average over `window` values (an odd number), over fewer at both ends."""
    ones = np.ones(window)
    return np.convolve(values, ones, "same")[: len(values)] / np.convolve(np.ones(len(values)), ones, "same")


@rc_context(STYLE)
def loss_picture(rows: Rows) -> bytes:
    """Flow loss on the left, positive and negative alignment terms on the right, over steps."""
    figure, (left, right) = _figure(2)
    _curve(left, rows, "train/flow", SERIES[0], "training")
    steps, values = series(rows, "validation/flow")
    left.plot(steps, values, "o-", color=SERIES[1], markersize=3.5, label="held-out clips")
    left.set(title="Flow loss", xlabel="step")
    _curve(right, rows, "train/positive", SERIES[0], "positive: far from its own teacher feature")
    _curve(right, rows, "train/negative", SERIES[1], "negative: close to another subject's")
    right.set(title="Alignment loss", xlabel="step", ylim=(0, None))
    for axes in (left, right):
        axes.legend()
    return _png(figure)


@rc_context(STYLE)
def cosine_picture(rows: Rows) -> bytes:
    """Mean cosine of projected reference tokens and their teacher features over steps, a line per aligned block.

    Training clips on the left, held-out clips on the right.
    """
    figure, (left, right) = _figure(2)
    names = list(dict.fromkeys(name for row in rows for name in row if name.startswith("train/cosine/block_")))
    for index, name in enumerate(names):
        color, label = SERIES[index % len(SERIES)], f"block {name.rpartition('_')[2]}"
        _curve(left, rows, name, color, label, raw=False)
        right.plot(
            *series(rows, name.replace("train/", "validation/")), "o-", color=color, markersize=3.5, label=label
        )
    left.set(title="Cosine to the teacher, training clips", xlabel="step")
    right.set(title="Held-out clips", xlabel="step")
    right.sharey(left)
    left.legend(ncols=2)
    return _png(figure)


@rc_context(STYLE)
def features_picture(points: dict[str, np.ndarray], subjects: np.ndarray, names: Sequence[str]) -> bytes:
    """Reference features in two dimensions, coloured by subject.

    Args:
        points: title -> (R, 2), a panel each.
        subjects: (R,) index into `names`.
        names: the subjects.
    """
    figure, panels = _figure(len(points), width=3.9)
    for axes, (title, values) in zip(panels, points.items(), strict=True):
        for index, name in enumerate(names):
            mine = values[subjects == index]
            axes.scatter(*mine.T, s=26, color=SERIES[index % len(SERIES)], label=name, alpha=0.85, linewidths=0)
        axes.set(title=title, xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_facecolor("#f6f7f9")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


@rc_context(STYLE)
def sensitivity_picture(sensitivity: Sensitivity) -> bytes:
    """How much the loss rises with wrong, swapped or no references, with 95 % intervals; then row by row."""
    figure, (left, right) = _figure(2)
    losses = sensitivity.rows.numpy()
    extra = losses[:, 1:] - losses[:, :1]
    spread = 1.96 * extra.std(0, ddof=1) / np.sqrt(len(extra))
    names = ["another clip's", "in another order", "none"]
    bars = left.bar(names, extra.mean(0), yerr=spread, capsize=4, color=SERIES[1:4], width=0.55)
    left.bar_label(bars, fmt="%+.4f", padding=3)
    left.axhline(0, color=INK, linewidth=0.8)
    left.margins(y=0.2)
    left.set(title="Extra held-out flow loss without the right references", xlabel="references given")
    gains = np.sort(extra[:, 0])
    right.bar(np.arange(len(gains)), gains, width=1, color=np.where(gains > 0, SERIES[0], "#b8c0cc"))
    right.axhline(0, color=INK, linewidth=0.8)
    right.set(
        title=f"The right references are better for {(gains > 0).sum()} of {len(gains)} clips",
        xlabel="held-out clips, in order",
        ylabel="extra loss, another clip's",
        xticks=[],
    )
    return _png(figure)


def _curve(axes: Axes, rows: Rows, name: str, color: str, label: str, raw: bool = True) -> None:
    steps, values = series(rows, name)
    if raw:
        axes.plot(steps, values, color=color, alpha=0.18, linewidth=0.8)
    axes.plot(steps, smooth(values, len(values) // 40 * 2 + 1), color=color, label=label)


def _figure(panels: int, width: float = 4.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * panels, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()

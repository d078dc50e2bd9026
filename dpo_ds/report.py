"""A run's curves as one picture, from its ``metrics.jsonl`` alone. No ranks, no models."""

import json
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dpo_ds.files import write_whole

_TRAIN, _EVAL, _REJECTED, _QUIET = "#7fa3cc", "#12355b", "#c8553d", "#8a8a8a"
_SMOOTHED_FROM = 30

Line = Mapping[str, Any]


def plot_curves(metrics_path: Path, png_path: Path) -> None:
    """Draws loss, reward accuracy, reward margin and the rewards of both responses against the step.

    Args:
        metrics_path: the run's ``metrics.jsonl``.
        png_path: the picture; complete or not at all; an earlier one is replaced.
    """
    lines = [json.loads(line) for line in metrics_path.read_text(encoding="utf-8").splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    evaluation = [line for line in lines if line["split"] == "eval"]
    figure = Figure(figsize=(9, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, margin, rewards = figure.subplots(2, 2, sharex=True).flat
    for axes, name, title in (
        (loss, "loss", "loss"),
        (accuracy, "rewards/accuracies", "reward accuracy"),
        (margin, "rewards/margins", "reward margin"),
    ):
        _draw(axes, train, name, color=_TRAIN, label="train")
        _draw_evaluation(axes, evaluation, name, color=_EVAL, label="held-out")
        axes.set_title(title, loc="left")
    for name, color in (("chosen", _EVAL), ("rejected", _REJECTED)):
        _draw(rewards, train, f"rewards/{name}", color=color, label=name)
        _draw_evaluation(rewards, evaluation, f"rewards/{name}", color=color, label=f"{name}, held-out")
    rewards.set_title("rewards", loc="left")
    accuracy.set_ylim(-0.03, 1.03)
    accuracy.axhline(0.5, color=_QUIET, linewidth=0.8, linestyle=":")
    for axes in (margin, rewards):
        axes.axhline(0, color=_QUIET, linewidth=0.8, linestyle=":")
    for axes in (loss, accuracy, margin, rewards):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    for axes in (margin, rewards):
        axes.set_xlabel("optimizer step")
    picture = BytesIO()
    figure.savefig(picture, format="png")
    write_whole(png_path, picture.getvalue())


def _points(lines: Iterable[Line], name: str) -> tuple[list[int], list[float]]:
    known = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in known], [value for _, value in known]


def _draw(axes: Axes, lines: Iterable[Line], name: str, *, color: str, label: str) -> None:
    steps, values = _points(lines, name)
    if not steps:
        return
    if len(steps) < _SMOOTHED_FROM:
        axes.plot(steps, values, color=color, linewidth=1.5, marker="o", markersize=2.5, label=label)
        return
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
    axes.plot(steps, _running_mean(values, width=len(values) // 15), color=color, linewidth=1.8, label=label)


def _draw_evaluation(axes: Axes, lines: Iterable[Line], name: str, *, color: str, label: str) -> None:
    steps, values = _points(lines, name)
    if steps:
        axes.plot(steps, values, color=color, linewidth=1.2, linestyle="--", marker="D", markersize=4.5, label=label)


def _running_mean(values: list[float], *, width: int) -> list[float]:
    windows = [values[max(0, place - width) : place + width + 1] for place in range(len(values))]
    return [sum(window) / len(window) for window in windows]

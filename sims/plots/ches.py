"""CHES against truth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sims.figures import save_picture
from sims.palette import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    SKY,
)
from sims.plots._axes import figure_of, new_figure, styled
from sims.scenarios.ches_truth import PERCENTILES, REGIMES, SCORES, ChesTruth

SCORE_COLORS = dict(zip(SCORES, (BLACK, BLUE, SKY, ORANGE, PINK), strict=True))
REGIME_COLORS = dict(zip(REGIMES, (GREY, BLUE, ORANGE, GREEN), strict=True))


@styled
def plot_ches_truth(data: ChesTruth, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Mean change of ln pi(y+) over percentile subsets of each score, a panel per data set; alphas; rank correlations.

    axes : one per data set and two more; default a new figure of two rows.
    """
    own = axes is None
    axes = list(new_figure(10.4, 6.2).subplots(2, 3).flat) if axes is None else list(axes)
    if len(axes) != len(data.regimes) + 2:
        raise ValueError(f"ax must hold {len(data.regimes) + 2} axes, got {len(axes)}")
    at = np.arange(len(PERCENTILES))
    for ax, r, letter in zip(axes, data.regimes, "abcd", strict=False):
        for key, label in SCORES.items():
            ax.plot(at, r.by_percentile(key), "o-", ms=3.5, color=SCORE_COLORS[key], lw=1.4, label=label)
        ax.axhline(0, color=BLACK, lw=0.8)
        ax.set_xticks(at, [str(p) for p in PERCENTILES])
        ax.set(xlabel="percentile of the score", ylabel=r"mean change of $\ln\,\pi(y^+)$  (nats)")
        ax.set_title(f"({letter}) {r.name}: " + REGIMES[r.name].replace(", ", ",\n"))
    edges = np.linspace(-2, 2, 41)
    for r in data.regimes:
        share = f"{r.name}: {(r.alphas > 0).mean():.0%} > 0"
        weights = np.full(r.alphas.size, 1 / r.alphas.size)
        kind: Any = {"histtype": "step", "lw": 1.4, "color": REGIME_COLORS[r.name], "label": share}
        axes[-2].hist(r.alphas, list(edges), weights=weights, **kind)
    axes[-2].axvline(1, color=RED, lw=1, ls="--", label="CHES: 1")
    axes[-2].set(yscale="log", xlim=(-2, 2), xlabel=r"$\alpha$", ylabel="share of all alphas (log axis)")
    axes[-2].set_title("(e) the alphas, which CHES replaces by 1")
    axes[-2].legend(loc="upper left", fontsize=7.5, borderaxespad=0)
    width = 0.8 / len(SCORES)
    for i, (key, color) in enumerate(SCORE_COLORS.items()):
        x = np.arange(len(data.regimes)) + (i - (len(SCORES) - 1) / 2) * width
        axes[-1].bar(x, [r.correlation(key) for r in data.regimes], width, color=color)
    axes[-1].axhline(0, color=BLACK, lw=0.8)
    axes[-1].set_xticks(np.arange(len(data.regimes)), [r.name for r in data.regimes])
    axes[-1].set(ylim=(-1.05, 0.3), ylabel="Spearman correlation")
    axes[-1].set_title("(f) rank correlation with that change")
    if own:
        figure_of(axes[0]).legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SCORES))
    return axes


def save_ches_truth(data: ChesTruth, path: Path | str) -> Path:
    """`plot_ches_truth` as a .png, .svg or .pdf file, written atomically."""
    return save_picture(figure_of(plot_ches_truth(data)[0]), Path(path))

"""Which part of a network displaces, and theories beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sims.figures import save_picture
from sims.language.studies.beside import Beside
from sims.language.studies.mechanism_record import Mechanism
from sims.palette import BLACK, BLUE, FAINT, GREEN, GREY, ORANGE, PINK, RED, SKY
from sims.plots._axes import figure_of, new_figure, one, styled

PART_COLORS = {"head": GREEN, "body": ORANGE, "both": BLUE}
MARKERS = {"sgd": "o", "sign": "v", "rmsprop": "s", "adam": "D"}
SIDES = (1e-3, 1e3)  # where a body : head of 0 and of infinity are drawn


def _look(label: str) -> dict[str, object]:
    """Line of a theory: measured once thin, re-measured thick, unconstrained features dashed."""
    if label == "unconstrained":
        return {"color": GREY, "ls": "--", "lw": 1.6}
    if label == "sphere":
        return {"color": PINK, "ls": "--", "lw": 1.6}
    if label == "stream":
        return {"color": GREEN, "ls": "-.", "lw": 1.6}
    if label.endswith("x 1"):
        return {"color": ORANGE, "ls": ":", "lw": 2.0}
    return {"color": {"4": SKY, "16": BLUE}[label.rpartition(" ")[2]], "ls": "-", "lw": 1.6}


def _drawn(b: Beside) -> list[str]:
    ends = ("x 1", "x 4", "x 16")
    return [k for k in b.theories if k in ("unconstrained", "sphere", "stream") or k.endswith(ends)]


@styled
def plot_phase_of_runs(data: Mechanism, ax: Axes | None = None) -> Axes:
    """Moments of all runs: body : head in the margin against what the body's motion costs ln pi(y+); filled: it fell.

    Above the line ln pi(y+) falls, below it rises: the condition kappa > kappa* of exact_solution E4 with what was
    measured in the place of eta_h |a|^2 and <W_+ - Wbar, a>, the same line for every prompt and optimiser.
    """
    ax = one(ax, 5.2, 4.0)
    for g in data.groups:
        share, rho, slope = (np.array(g.points[k]) for k in ("share", "rho", "slope"))
        with np.errstate(divide="ignore"):
            x = np.clip(share / (1 - share), *SIDES)
        x = x * 10 ** np.random.default_rng(0).uniform(-0.12, 0.12, len(x)) if share[0] in (0, 1) else x
        color, fell = PART_COLORS[g.trained], slope < 0
        for where, face in ((fell, color), (~fell, "none")):
            ax.scatter(x[where], rho[where], s=9, marker=MARKERS[g.optimizer], ec=color, fc=face, lw=0.5, zorder=3)
    grid = np.geomspace(SIDES[0] / 2, SIDES[1] * 2, 200)
    ax.plot(grid, 1 / grid, color=RED, lw=2, label=r"$\kappa=\kappa^*$ as measured", zorder=2)
    ax.axhline(0, color=BLACK, lw=0.7)
    ax.set_yscale("symlog", linthresh=0.1)
    ax.set(xscale="log", xlim=(SIDES[0] / 2, SIDES[1] * 2), ylim=(-30, 100))
    ax.set_xticks([SIDES[0], 1e-1, 1e1, SIDES[1]], ["head\nonly", "0.1", "10", "body\nonly"])
    ax.set_xlabel("growth of the margin through the body : through the head")
    ax.set_ylabel(r"fall of $\ln\,\pi(y^+)$ per nat by the body" + "\n: rise per nat by the head")
    for part, color in PART_COLORS.items():
        ax.plot([], [], "o", color=color, ms=4, label=part)
    for name, marker in MARKERS.items():
        ax.plot([], [], marker, color=GREY, ms=4, label=name)
    ax.plot([], [], "o", mec=GREY, mfc="none", ms=4, label="open: it rose")
    ax.legend(loc="lower left", fontsize=7.5, borderaxespad=0)
    return ax


@styled
def plot_drops(data: Mechanism, ax: Axes | None = None) -> Axes:
    """Largest later drop of pi(y+) against the body's share at the start, means over runs; filled if most displace."""
    ax = one(ax, 4.6, 4.0)
    for g in data.groups:
        share = float(np.mean(g.share, axis=0)[0])
        x = np.clip(share / (1 - share) if share < 1 else np.inf, *SIDES)
        x *= 1.25 ** (list(MARKERS).index(g.optimizer) - 1.5)
        color = PART_COLORS[g.trained]
        face = color if g.displaced > len(g.drop) / 2 else "none"
        ax.scatter(x, np.mean(g.drop), s=38, marker=MARKERS[g.optimizer], ec=color, fc=face, lw=1.2)
    ax.set(xscale="log", xlim=(SIDES[0] / 3, SIDES[1] * 3), ylim=(-0.03, 1.0))
    ax.set_xticks([SIDES[0], 1e-1, 1e1, SIDES[1]], ["head\nonly", "0.1", "10", "body\nonly"])
    ax.set_xlabel("body : head at the start")
    ax.set_ylabel(r"largest later drop of $\pi(y^+)$, mean")
    return ax


@styled
def plot_beside(b: Beside, key: str, ax: Axes | None = None) -> Axes:
    """A statistic of every theory over the margin gained: "rank", "right", "rival_right" (with 95 % intervals), or the
    mean change of ln pi, "plus" or "rival", with the network's own; margins that most runs reach, and their end.
    """
    ax = one(ax, 3.6, 3.0)
    many = [p for p, n in enumerate(b.runs[:-1]) if n > b.runs[-1] / 2]
    x, end = [b.gained[p] for p in many], b.gained[-1]
    for label in _drawn(b):
        values = np.array([b.theories[label][p][key] for p in (*many, -1)], dtype=float)
        look: Any = _look(label)
        middle = values if values.ndim == 1 else values[:, 0]
        ax.plot(x, middle[:-1], label=label, **look)
        ax.plot([end], middle[-1:], "s", ms=4, color=look["color"])
        if values.ndim == 2:
            ax.fill_between(x, *values[:-1, 1:].T, color=look["color"], alpha=0.15, lw=0)
    if key in ("plus", "rival"):
        happened = np.array(b.happened)[[*many, -1], 0 if key == "plus" else 1]
        ax.plot(x, happened[:-1], "o-", color=BLACK, ms=3.5, lw=1, label="the network", zorder=5)
        ax.plot([end], happened[-1:], "s", color=BLACK, ms=4.5, zorder=6, label="squares: end of the runs")
        ax.axhline(0, color=FAINT, lw=0.8, zorder=0)
        size = abs(happened).max()
        ax.set_ylim(min(0, happened.min()) - 0.6 * size, max(0, happened.max()) + 0.6 * size)
    else:
        ax.set_ylim(-0.05, 1.05)
    ax.set_xlabel("margin gained (nats)")
    return ax


@styled
def plot_mechanism_theories(data: Mechanism, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """A row per condition: mean change of ln pi(y+), rank agreement over tokens, signs of y+ and of the rival right."""
    rows = [b for b in data.beside if b.what == "tokens"]
    if axes is None:
        axes = list(new_figure(12.0, 2.8 * len(rows) + 0.4).subplots(len(rows), 4, squeeze=False).flat)
    words = data.parameters["preferred"], data.parameters["rival"]
    names = {
        "plus": rf"mean change of $\ln\,\pi$({words[0]})  (nats)",
        "rank": "Spearman over tokens",
        "right": f"sign for {words[0]} right",
        "rival_right": f"sign for {words[1]} right",
    }
    for i, b in enumerate(rows):
        for j, (key, name) in enumerate(names.items()):
            ax = plot_beside(b, key, axes[4 * i + j])
            ax.set_ylabel(name)
            if not j:
                ax.set_title(f"{b.trained} by {b.optimizer} {b.lr:g}, {b.runs[0]} runs")
                ax.legend(loc="lower left", fontsize=7)
    return list(axes)


def save_mechanism(data: Mechanism, folder: Path | str) -> list[Path]:
    """The two figures as files in the folder."""
    figure = new_figure(10.4, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    plot_phase_of_runs(data, left)
    plot_drops(data, right)
    made = [save_picture(figure, Path(folder) / "mechanism.png")]
    if any(b.what == "tokens" for b in data.beside):
        theories = plot_mechanism_theories(data)
        made.append(save_picture(figure_of(theories[0]), Path(folder) / "mechanism_theories.png"))
    return made

"""Figures of the atlas of losses: incentive ratios over the plane of log-ratios, and masks that learn."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from sims.palette import BLACK, GREEN, GREY, ORANGE, SKY, shown
from sims.plots._axes import Array, figure_of, in_row, new_figure, styled
from sims.sparse import MaskRun
from sims.trajectory import Trajectory
from theory.conditions import IncentiveRatio
from theory.model import Response

SPAN = 3.0  # ln r beyond which colours no longer change
FAR = 50.0  # stands for ln r = inf and -inf
COLUMNS = 6


@styled
def plot_incentives(
    maps: Mapping[str, IncentiveRatio],
    da: Array,
    db: Array,
    band: tuple[float, float] | None = None,
    paths: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    axes: Sequence[Axes] | None = None,
) -> list[Axes]:
    """ln r = ln(d_w/d_l) of each loss over the log-ratios of y+ and y- to the reference (nats), all in one scale.

    maps : incentives of shape (len(db), len(da)) by name. band : (lower, upper) ratios of a geometry: ln pi(y+) falls
    where r is below the solid line, ln pi(y-) rises where it is above the dashed one. paths : (da, db) of training.
    A loss that does not push y+ up is drawn as r = 0, one that pushes y+ up and not y- down as r = inf; where it does
    neither, or the wrong of both, the panel is grey.
    """
    own = axes is None
    if axes is None:
        rows = -(-len(maps) // COLUMNS)
        grid = new_figure(10.6, 1.62 * rows + 0.5).subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
        axes = list(grid.flat)[: len(maps)]
        for ax in list(grid.flat)[len(maps) :]:
            ax.axis("off")
        for ax in axes[-COLUMNS:]:
            ax.tick_params(labelbottom=True)
    if len(axes) != len(maps):
        raise ValueError(f"axes must hold one per loss ({len(maps)}), got {len(axes)}")
    for ax, (name, found) in zip(axes, maps.items(), strict=True):
        if found.d_w.shape != (len(db), len(da)):
            raise ValueError(f"maps[{name!r}] must have shape {(len(db), len(da))}, got {found.d_w.shape}")
        _map(ax, log_ratio(found), da, db, band)
        if paths is not None and name in paths:
            ax.plot(*paths[name], color=BLACK, lw=1.3)
        ax.plot(0, 0, "o", ms=3.5, mfc="white", mec=BLACK, mew=0.8, zorder=5)
        ax.set(xlim=(da[0], da[-1]), ylim=(db[0], db[-1]))
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.set_title(name, fontsize=8, pad=3)
    if own:
        figure = figure_of(axes[0])
        bar = figure.colorbar(axes[0].collections[0], ax=figure.axes, extend="both", shrink=0.5, aspect=30, pad=0.01)
        bar.set_label(r"$\ln\,r$: blue favours $y^+$, red weighs on $y^-$")
        figure.supxlabel(r"$da=\ln\,\pi(y^+)-\ln\,\pi_{\mathrm{ref}}(y^+)$  (nats)", fontsize=9)
        figure.supylabel(r"$db=\ln\,\pi(y^-)-\ln\,\pi_{\mathrm{ref}}(y^-)$  (nats)", fontsize=9)
    return list(axes)


def log_ratio(found: IncentiveRatio) -> Array:
    """ln r, in [-FAR, FAR]; NaN where the loss neither pushes y+ up nor y- down."""
    d_w, d_l = np.asarray(found.d_w), np.asarray(found.d_l)
    with np.errstate(divide="ignore", invalid="ignore"):
        out = np.clip(np.log(d_w) - np.log(d_l), -FAR, FAR)
    out = np.where(d_w <= 0, -FAR, np.where(d_l <= 0, FAR, out))
    return np.where((d_w <= 0) & (d_l <= 0), np.nan, out)


def _map(ax: Axes, values: Array, da: Array, db: Array, band: tuple[float, float] | None) -> None:
    ax.set_facecolor(GREY)
    ax.pcolormesh(da, db, values, cmap="RdBu", vmin=-SPAN, vmax=SPAN, shading="nearest", rasterized=True)
    for edge, style in zip(np.log(band or ()), ("solid", "dashed"), strict=False):
        if np.nanmin(values) < edge < np.nanmax(values):
            ax.contour(da, db, values, levels=[edge], colors=[BLACK], linewidths=0.8, linestyles=style)


@styled
def plot_masks(learned: MaskRun, others: Mapping[str, Trajectory], axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Masks of the tokens of the first sample while they learn, and ln pi(y+) with them and without.

    others : runs of the same model by label, drawn beside the learned one. axes : two.
    """
    axes = in_row(axes, (1.15, 1), 9.4, 3.2)
    t = learned.trajectory
    sample, name = t.model.samples[0], t.model.name
    responses: dict[str, Response] = {"y^+": sample.preferred, "y^-": sample.dispreferred}
    labels = [f"${y}_{k + 1}$: {shown(name(z))}" for y, tokens in responses.items() for k, z in enumerate(tokens)]
    masks = np.concatenate([learned.masks(y, sample.prompt) for y in responses.values()], axis=1).T
    rows = np.arange(len(labels))
    mesh = axes[0].pcolormesh(t.times, rows, masks, cmap="Blues", vmin=0, shading="nearest", rasterized=True)
    figure_of(axes[0]).colorbar(mesh, ax=axes[0], label="mask")
    axes[0].axhline(len(sample.preferred) - 0.5, color=BLACK, lw=0.8)
    axes[0].set_yticks(rows, labels)
    axes[0].invert_yaxis()
    axes[0].set(xlabel="step")
    axes[0].set_title("(a) mask of each token, white: 0")
    runs = {"learned masks": t, **others}
    for (label, run), color in zip(runs.items(), (BLACK, ORANGE, SKY, GREEN), strict=False):
        a = run.log_probs(sample.preferred, sample.prompt)
        margin = a - run.log_probs(sample.dispreferred, sample.prompt)
        axes[1].plot(margin - margin[0], a - a[0], color=color, label=label)
    axes[1].axhline(0, color=GREY, lw=0.8)
    axes[1].set(xlabel="margin gained (nats)", ylabel=r"change of $\ln\,\pi(y^+)$ (nats)")
    axes[1].set_title("(b) the preferred response")
    axes[1].legend()
    return axes

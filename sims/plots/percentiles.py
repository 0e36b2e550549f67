"""Similarity scores against the fall of ln pi(y+) on a language model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from sims.figures import save_picture
from sims.language.scores import SCORES
from sims.language.studies.percentile_record import OWN, PERCENTILES, Percentiles, Setting
from sims.language.studies.percentile_tables import ends
from sims.palette import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY
from sims.plots._axes import figure_of, new_figure, styled

COLORS = dict(zip(SCORES, (BLACK, RED, RED, GREEN, BLUE, SKY, BLUE, SKY, ORANGE, PINK), strict=True))
DASHED = ("rmsprop", "ches_centred", "ln_ches_centred")
SHORT = {
    "gradient": "gradient",
    "sign": "sign",
    "rmsprop": "RMSprop's first step",
    "alpha": "head term (alphas kept)",
    "ches": "CHES",
    "ln_ches": "ln-CHES",
    "ches_centred": "CHES, centred",
    "ln_ches_centred": "ln-CHES, centred",
    "edit": "edit similarity",
    "last_hidden": "last hidden",
}
OPTIMIZERS = {"sgd": "SGD", "sign": "sign descent", "rmsprop": "RMSprop", "adam": "Adam"}


@styled
def plot_percentiles(
    data: Percentiles, kind: str | None = None, loss: str | None = None, axes: Sequence[Axes] | None = None
) -> list[Axes]:
    """For one kind of pairs and loss (default the first): correlations of every score; of some against the step size, a
    panel per optimiser; mean change over percentile subsets, a panel per setting.

    axes : as many as that is; default a new figure.
    """
    kind = data.kinds[0] if kind is None else kind
    loss = data.losses[0] if loss is None else loss
    settings = [s for s in data.settings if s.loss == loss]
    optimizers = list(dict.fromkeys(s.optimizer for s in settings))
    subsets = [s for s in data.subset_settings if s.loss == loss]
    count = 1 + len(optimizers) + len(subsets)
    own = axes is None
    columns = -(-count // 2)
    axes = list(new_figure(4.0 * columns + 1.5, 7.4).subplots(2, columns).flat) if axes is None else list(axes)
    if len(axes) < count or (not own and len(axes) != count):
        raise ValueError(f"axes must hold {count} axes, got {len(axes)}")
    for spare in axes[count:]:
        spare.set_axis_off()
    _bars(axes[0], data, kind, ends(settings))
    letters = iter("bcdefghij")
    for ax, name in zip(axes[1:], optimizers, strict=False):
        _decay(ax, data, kind, [s for s in settings if s.optimizer == name])
        ax.set_title(f"({next(letters)}) {OPTIMIZERS[name]}: from small to large steps")
    for ax, s in zip(axes[1 + len(optimizers) :], subsets, strict=False):
        _subsets(ax, data, kind, s)
        ax.set_title(f"({next(letters)}) subsets of {data.parameters['size']}, {s.short} steps")
    if own:
        lines = next((ax for ax in axes[1 + len(optimizers) : count]), axes[min(1, count - 1)])
        figure_of(axes[0]).legend(*lines.get_legend_handles_labels(), loc="outside lower center", ncols=5)
        figure_of(axes[0]).suptitle(f"{kind} pairs ({data.describe(kind)}), {loss}", x=0.01, ha="left", fontsize=10)
    return axes[:count]


def _bars(ax: Axes, data: Percentiles, kind: str, settings: list[Setting]) -> None:
    """Every score at the ends of the range of steps, with intervals."""
    height = 0.8 / len(settings)
    for j, (s, color) in enumerate(zip(settings, (BLUE, SKY, RED, ORANGE, GREEN, GREY), strict=False)):
        found = [data.correlation(kind, s, name) for name in SCORES]
        y = np.arange(len(SCORES)) + (j - (len(settings) - 1) / 2) * height
        value = np.array([e.value for e in found])
        error = np.abs([[e.low, e.high] for e in found] - value[:, None]).T
        ax.barh(y, value, height, xerr=error, color=color, error_kw={"lw": 0.8}, label=s.short)
    ax.axvline(0, color=BLACK, lw=0.8)
    ax.set_yticks(np.arange(len(SCORES)), [SHORT[name] for name in SCORES])
    ax.invert_yaxis()
    ax.set(xlim=(-1, 1.05), xlabel=r"rank correlation with the fall of $\ln\,\pi(y^+)$")
    ax.set_title("(a) each pair trained on alone")
    ax.legend(fontsize=6.5, loc="upper left", borderaxespad=0.2)


def _decay(ax: Axes, data: Percentiles, kind: str, settings: list[Setting]) -> None:
    """Correlations of the optimiser's own predictor and the rivals against the step size."""
    x = [s.lr for s in settings]
    for name in dict.fromkeys((OWN[settings[0].optimizer], "alpha", "ches", "ln_ches", "edit")):
        found = [data.correlation(kind, s, name) for s in settings]
        ax.plot(x, [e.value for e in found], "o-", ms=3.5, lw=1.4, color=COLORS[name], label=SHORT[name])
        ax.fill_between(x, [e.low for e in found], [e.high for e in found], color=COLORS[name], alpha=0.12, lw=0)
    shares = [data.falls(kind, s) for s in settings]
    ax.plot(x, [fell for _, fell in shares], "s:", ms=3, lw=1, color=GREY, label="share of pairs that fell")
    ax.plot(x, [share for share, _ in shares], ":", lw=1, color=BLACK, label="share predicted to (1st order)")
    ax.axhline(0, color=BLACK, lw=0.8)
    unit = " per unit slope" if settings[0].optimizer == "sgd" else ""
    ax.set(xscale="log", ylim=(-1, 1.05), xlabel=f"learning rate{unit}", ylabel="rank correlation; share")
    ax.legend(fontsize=6.5, loc="lower left", ncols=2, borderaxespad=0.2)


def _subsets(ax: Axes, data: Percentiles, kind: str, setting: Setting) -> None:
    """Mean change of ln pi(y+) over the subsets of each score, mean over draws."""
    at = np.arange(len(PERCENTILES))
    for name in data.subset_scores(kind, setting):
        trained, _ = data.by_percentile(kind, setting, name)
        ax.plot(
            at,
            trained.mean(0),
            "--o" if name in DASHED else "-o",
            ms=3.5,
            lw=1.4,
            color=COLORS[name],
            label=SHORT[name],
        )
    held = np.mean(
        [data.by_percentile(kind, setting, name)[1].mean(0) for name in data.subset_scores(kind, setting)], axis=0
    )
    ax.plot(at, held, ":", lw=1.6, color=GREY, label="pairs held out (mean over scores)")
    ax.axhline(0, color=BLACK, lw=0.8)
    ax.set_xticks(at, [str(p) for p in PERCENTILES])
    ax.set(xlabel="percentile of the score", ylabel=r"mean change of $\ln\,\pi(y^+)$  (nats)")


def save_percentiles(data: Percentiles, folder: Path | str) -> list[Path]:
    """A figure per kind of pairs and loss, written atomically; their paths."""
    paths = []
    for kind in data.kinds:
        for i, loss in enumerate(data.losses):
            name = f"percentiles-{kind}" + (f"-{i + 1}" if len(data.losses) > 1 else "") + ".png"
            paths.append(save_picture(figure_of(plot_percentiles(data, kind, loss)[0]), Path(folder) / name))
    return paths

"""Section 3 on a small language model: courses, gainers, controls, sweeps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sims.figures import save_picture
from sims.language.studies.persona_record import Group, PersonaStudy, role, top_gainers
from sims.palette import BLACK, FAINT, GREY, ROLE_COLORS, SKY, WORD_COLORS, YELLOW
from sims.plots._axes import figure_of, new_figure, one, styled

ROLE_NAMES = {"benign": "benign", "catastrophic": "catastrophic", "": "neither"}


@styled
def plot_persona_course(study: PersonaStudy, loss: str | None = None, ax: Axes | None = None) -> Axes:
    """Probability (log axis) of the words of No over Never after SFT, over steps: every run thin, geometric mean thick.

    loss : which, as its repr; default the first of the study.
    """
    ax = one(ax, 4.6, 3.6)
    groups = _main(study, loss)
    common = set.intersection(*(set(g.course) for g in groups))
    words = [w for w in groups[0].course if w in common]
    steps = study.parameters["kept"]
    for word in words:
        courses = np.concatenate([np.asarray(g.course[word]) for g in groups])
        color, style = _look(word, words)
        ax.plot(steps, np.exp(courses).T, color=color, lw=0.4, alpha=0.3)
        ax.plot(steps, np.exp(courses.mean(axis=0)), style, color=color, lw=2, label=word)
    ax.set(yscale="log", ylim=(1e-4, 1.3), xlabel="step", ylabel=r"$\pi(z\,|\,x)$  (log axis)")
    ax.set_title(f"{groups[0].pair}, {groups[0].loss}, after SFT")
    ax.legend(loc="lower center", ncols=2)
    return ax


@styled
def plot_persona_gainers(study: PersonaStudy, loss: str | None = None, ax: Axes | None = None, most: int = 5) -> Axes:
    """Mean gain in probability of the words most often among the top three, at each step; coloured by their role."""
    ax = one(ax, 4.6, 3.6)
    groups = _main(study, loss)
    labels: list[str] = []
    for step in groups[0].gains:
        for word, gains, n in top_gainers(groups, step)[:most]:
            kind = role(word, groups[0].preferred)
            color = ROLE_COLORS["preferred"] if word == groups[0].preferred else ROLE_COLORS.get(kind, GREY)  # type: ignore[call-overload]
            ax.barh(-len(labels), np.mean(gains), color=color, height=0.75)
            end: Any = (max(0.0, float(np.mean(gains))), -len(labels))
            ax.annotate(f"{len(gains)}/{n}", end, (3, 0), textcoords="offset points", va="center", size=7)
            labels.append(f"step {step}: {word}" if word == top_gainers(groups, step)[0][0] else word)
    ax.set_yticks(-np.arange(len(labels)), labels)
    ax.axvline(0, color=BLACK, lw=0.8)
    ax.margins(x=0.12)
    ax.set(xlabel=r"mean gain of $\pi(z\,|\,x)$ in the runs counted")
    ax.set_title("top three gainers (runs with the word among them)")
    for key, name in (("preferred", r"$y^+$"), ("benign", "benign"), ("catastrophic", "catastrophic")):
        ax.plot([], [], "s", color=ROLE_COLORS[key], label=name)  # type: ignore[index]
    ax.plot([], [], "s", color=GREY, label="neither")
    ax.legend(loc="lower right")
    return ax


@styled
def plot_persona_controls(study: PersonaStudy, ax: Axes | None = None) -> Axes:
    """Largest later drop of pi(No) by what it was preferred over after SFT: every run, and the mean."""
    ax = one(ax, 4.6, 3.6)
    loss = study.groups[0].loss
    others = ["Never", *dict.fromkeys(g.dispreferred for g in study.groups if g.control)]
    drops = {w: np.concatenate([g.drop for g in study.select(loss=loss, pair=f"No/{w}", tuned=True)]) for w in others}
    others.sort(key=lambda w: drops[w].mean())
    for i, word in enumerate(others):
        color = WORD_COLORS.get(word, GREY)
        spread = (np.arange(len(drops[word])) % 7 - 3) * 0.06  # points of equal drop beside each other
        ax.plot(drops[word], i + spread, ".", color=color, ms=4, alpha=0.6)
        ax.plot([drops[word].mean()] * 2, [i - 0.35, i + 0.35], color=BLACK, lw=1.6)
    ax.set_yticks(range(len(others)), others)
    ax.set(xlim=(-0.02, 1), xlabel=r"largest later drop of $\pi$(No)", ylabel="No preferred over")
    ax.set_title(f"controls, {loss}, after SFT")
    return ax


@styled
def plot_persona_falls(study: PersonaStudy, ax: Axes | None = None) -> Axes:
    """Start, peak and end of pi(y+), mean over runs, for every model, loss and pair."""
    ax = one(ax, 4.6, 3.6)
    kinds = list(dict.fromkeys((g.pair, g.loss, g.sft is not None) for g in study.groups if not g.control))
    kinds.sort(key=lambda k: ([g.pair for g in study.groups].index(k[0]), k[1], k[2]))
    for i, (pair, loss, tuned) in enumerate(kinds):
        groups = study.select(pair=pair, loss=loss, tuned=tuned, control=False)
        start, peak, final = (_mean(groups, name) for name in ("start", "peak", "final"))
        ax.plot([start, peak, final], [-i] * 3, color=FAINT, lw=2.5, zorder=1)
        for value, marker, color in ((start, "o", SKY), (peak, "^", YELLOW), (final, "s", BLACK)):
            ax.plot(value, -i, marker, color=color, ms=5.5, mec=BLACK, mew=0.5)
    names = [f"{pair}  {loss.split('(')[0]}  {'SFT' if tuned else 'base'}" for pair, loss, tuned in kinds]
    ax.set_yticks(-np.arange(len(kinds)), names)
    for name, marker, color in (("start", "o", SKY), ("peak", "^", YELLOW), ("end", "s", BLACK)):
        ax.plot([], [], marker, color=color, mec=BLACK, mew=0.5, label=name)
    ax.set(xlim=(-0.02, 1.02), xlabel=r"$\pi(y^+)$, mean over runs")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.1)
    return ax


@styled
def plot_persona_sweep(study: PersonaStudy, ax: Axes | None = None) -> Axes:
    """No over Never as frequencies vary: start, peak and end of pi(No) in every run, means as marks."""
    kinds = list(dict.fromkeys(g.varied for g in study.groups))
    ax = one(ax, 6.4, 1.2 + 0.3 * len(kinds))
    for i, varied in enumerate(kinds):
        groups = study.select(varied=varied, pair="No/Never")
        looks: Any = (("start", "o", SKY, 0.22), ("peak", "^", YELLOW, 0.0), ("final", "s", BLACK, -0.22))
        for name, marker, color, shift in looks:
            values = np.concatenate([getattr(g, name) for g in groups])
            ax.plot(values, np.full(len(values), -i + shift), ".", color=color, ms=3, alpha=0.35, mew=0)
            ax.plot(values.mean(), -i + shift, marker, color=color, mec=BLACK, mew=0.5, ms=5.5)
            if not i:
                ax.plot([], [], marker, color=color, mec=BLACK, mew=0.5, label="end" if name == "final" else name)
    ax.set_yticks(-np.arange(len(kinds)), [k or "default" for k in kinds])
    ax.set(xlim=(-0.02, 1.02), xlabel=r"$\pi$(No) in No over Never, after SFT")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.1)
    return ax


def save_persona(study: PersonaStudy, folder: Path | str) -> list[Path]:
    """The study's figure as persona.png (of a sweep: persona_sweep.png) in the folder, written atomically."""
    if any(g.varied for g in study.groups):
        return [save_picture(figure_of(plot_persona_sweep(study)), Path(folder) / "persona_sweep.png")]
    figure = new_figure(10.4, 8.0)
    axes = figure.subplots(2, 2).flat
    draws = (plot_persona_course, plot_persona_falls, plot_persona_gainers)
    for draw, ax in zip(draws, axes, strict=False):
        draw(study, ax=ax)
    if any(g.control for g in study.groups):
        plot_persona_controls(study, ax=axes[3])
    else:
        axes[3].set_axis_off()
    return [save_picture(figure, Path(folder) / "persona.png")]


def _main(study: PersonaStudy, loss: str | None) -> list[Group]:
    """Groups of No over Never after SFT by one loss."""
    loss = study.groups[0].loss if loss is None else loss
    groups = study.select(pair="No/Never", loss=loss, tuned=True)
    if not groups:
        raise ValueError(f"loss must be one of {sorted({g.loss for g in study.groups})}, got {loss!r}")
    return groups


def _look(word: str, words: Sequence[str]) -> tuple[str, str]:
    """Colour and line style: the words of the triple have their own colours, the others differ by their style."""
    if word in WORD_COLORS:
        return WORD_COLORS[word], "-"
    others = [w for w in words if w not in WORD_COLORS]
    return GREY, ("--", ":", "-.")[others.index(word) % 3]


def _mean(groups: Sequence[Group], name: str) -> float:
    return float(np.concatenate([getattr(g, name) for g in groups]).mean())

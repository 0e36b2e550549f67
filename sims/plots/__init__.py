"""Figures. The only package that draws.

Every function takes data and optional axes and returns the axes; none touches pyplot's global state, so all work
without a display. Probabilities are drawn as ln pi (nats): negative changes of ln pi(y+) are displacement.
"""

from sims.plots._axes import new_figure, styled
from sims.plots.atlas import plot_incentives, plot_masks
from sims.plots.ches import plot_ches_truth, save_ches_truth
from sims.plots.compare import plot_comparison, save_comparison
from sims.plots.no_never_yes import (
    barycentric,
    plot_gains,
    plot_log_probs,
    plot_losses,
    plot_phase,
    plot_simplex,
    plot_simplex_moments,
    plot_story,
    save_figures,
)
from sims.plots.prediction import plot_prediction, save_prediction
from sims.plots.theorems import panels, plot_law, plot_ledger, plot_terms

__all__ = [
    "barycentric",
    "new_figure",
    "panels",
    "plot_ches_truth",
    "plot_comparison",
    "plot_gains",
    "plot_incentives",
    "plot_law",
    "plot_ledger",
    "plot_log_probs",
    "plot_losses",
    "plot_masks",
    "plot_phase",
    "plot_prediction",
    "plot_simplex",
    "plot_simplex_moments",
    "plot_story",
    "plot_terms",
    "save_ches_truth",
    "save_comparison",
    "save_figures",
    "save_prediction",
    "styled",
]

"""Likelihood displacement in preference optimisation: models, losses, exact flows and rates. Mathematics only."""

from theory import ches, losses, theorems
from theory._check import SolverError
from theory.check import check_loss
from theory.descent import ExactDescent
from theory.displacement import Displacement
from theory.exact import ExactFlow, batch_log_probs
from theory.model import Sample, UnconstrainedFeatures, contexts_of
from theory.problem import Problem
from theory.rates import log_prob_rate

__version__ = "0.1.0"
__all__ = [
    "Displacement",
    "ExactDescent",
    "ExactFlow",
    "Problem",
    "Sample",
    "SolverError",
    "UnconstrainedFeatures",
    "batch_log_probs",
    "check_loss",
    "ches",
    "contexts_of",
    "log_prob_rate",
    "losses",
    "theorems",
]

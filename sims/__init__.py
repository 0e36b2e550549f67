"""Experiments: simulated training, scenarios, figures and the command line. Imports theory, never the reverse."""

from sims.descent import Optimizer, gradient_descent, gradient_descent_batch
from sims.flow import gradient_flow, gradient_flow_batch
from sims.sparse import MaskRun, learn_masks
from sims.trajectory import Trajectory

__all__ = [
    "MaskRun",
    "Optimizer",
    "Trajectory",
    "gradient_descent",
    "gradient_descent_batch",
    "gradient_flow",
    "gradient_flow_batch",
    "learn_masks",
]

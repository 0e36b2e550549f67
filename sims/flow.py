"""Gradient flow by automatic differentiation of the loss value and a general ODE solver.

The independent route: nothing here knows a derivative of the loss, a closed path or a clock.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import solve_ivp
from tqdm.auto import tqdm

from sims.objective import Objective, few_threads, pick_device, stacked
from sims.trajectory import Trajectory
from theory._check import SolverError, check_number, check_times
from theory.losses import Interval, Loss
from theory.model import UnconstrainedFeatures

Array = NDArray[np.float64]
_RATE = Interval(low=0.0, open_low=False)
MAX_EVALUATIONS = 200_000  # gradients of one integration: minutes for a small model, far beyond any smooth flow


def gradient_flow(
    model: UnconstrainedFeatures,
    loss: Loss,
    times: ArrayLike,
    lr_unembedding: float = 1.0,
    lr_hidden: float = 1.0,
    *,
    rtol: float = 1e-11,
    atol: float = 1e-12,
    method: str = "DOP853",
    progress: bool = False,
) -> Trajectory:
    """dW/dt = -eta_W grad_W L, dH/dt = -eta_h grad_H L from the model's parameters, for any loss and data set.

    times : (T,) non-decreasing, >= 0; the flow starts at t = 0 whether or not 0 is among them.

    Raises
    ------
    ValueError : bad times, rates or loss.
    SolverError : the integration fails or leaves float range; never a shortened trajectory.
    """
    solver = {"rtol": rtol, "atol": atol, "method": method, "progress": progress}
    return gradient_flow_batch([model], loss, times, lr_unembedding, lr_hidden, device="cpu", **solver)[0]


def gradient_flow_batch(
    models: Sequence[UnconstrainedFeatures],
    loss: Loss,
    times: ArrayLike,
    lr_unembedding: float = 1.0,
    lr_hidden: float = 1.0,
    *,
    rtol: float = 1e-11,
    atol: float = 1e-12,
    method: str = "DOP853",
    progress: bool = False,
    device: str | None = None,
) -> list[Trajectory]:
    """`gradient_flow` of many independent models of one shape, integrated together with common time steps.

    device : where gradients are computed, as torch names it; default a GPU if there is one, else the CPU.
    """
    if not models:
        raise ValueError("models must not be empty")
    objective = Objective.of(models, loss)
    solver = {"rtol": rtol, "atol": atol, "method": method, "progress": progress, "device": device}
    grid, W, H = integrate(objective, *stacked(models), times, lr_unembedding, lr_hidden, **solver)
    return [Trajectory(m, grid, W[:, i], H[:, i], "gradient flow") for i, m in enumerate(models)]


def integrate(
    objective: Objective,
    W0: torch.Tensor,
    H0: torch.Tensor,
    times: ArrayLike,
    lr_unembedding: float,
    lr_hidden: float,
    *,
    rtol: float = 1e-11,
    atol: float = 1e-12,
    method: str = "DOP853",
    progress: bool = False,
    device: str | None = None,
) -> tuple[Array, Array, Array]:
    """times (T,), W (T, B, V, d), H (T, B, n, d) of the flow of B stacked models (see `gradient_flow`)."""
    grid = check_times(times)
    if not np.isfinite(grid).all():
        raise ValueError(f"times must be finite, got {grid[-1]}")
    eta_W = check_number(lr_unembedding, "lr_unembedding", _RATE)
    eta_h = check_number(lr_hidden, "lr_hidden", _RATE)
    place, size_W = pick_device(device), W0.numel()
    objective = replace(objective.to(place), rates=(eta_W, eta_h))

    bar = tqdm(total=float(grid[-1]), disable=not progress, desc="gradient flow", unit="t")
    with bar, few_threads(size_W + H0.numel()):
        evaluations = 0

        def velocity(t: float, state: Any) -> Any:
            nonlocal evaluations
            evaluations += 1
            if evaluations > MAX_EVALUATIONS:
                raise SolverError(
                    f"gradient flow of {objective.loss!r} stuck at t = {t:g} after {MAX_EVALUATIONS} gradients; "
                    "a loss with kinks may have no smooth flow where several samples pull on one"
                )
            x = torch.from_numpy(np.ascontiguousarray(state)).to(place)
            W = x[:size_W].view_as(W0).requires_grad_()
            H = x[size_W:].view_as(H0).requires_grad_()
            grad_W, grad_H = torch.autograd.grad(objective(W, H).sum(), (W, H))
            if progress and t > bar.n:
                bar.update(t - bar.n)
            return torch.cat([-eta_W * grad_W.reshape(-1), -eta_h * grad_H.reshape(-1)]).cpu().numpy()

        state = torch.cat([W0.reshape(-1), H0.reshape(-1)]).numpy()
        states, now = [], 0.0
        for t in grid:
            # One integration per interval: a solver's dense output is less accurate than its steps.
            if t > now:
                run = solve_ivp(velocity, (now, t), state, method, t_eval=[t], rtol=rtol, atol=atol)
                if not run.success or run.y.shape[1] != 1 or not np.isfinite(run.y).all():
                    raise SolverError(f"gradient flow of {objective.loss!r} failed before t = {t:g}: {run.message}")
                state, now = run.y[:, 0], float(t)
            states.append(state)
    states = np.stack(states)  # (T, size)
    W = states[:, :size_W].reshape(len(grid), *W0.shape)
    H = states[:, size_W:].reshape(len(grid), *H0.shape)
    return grid, W, H

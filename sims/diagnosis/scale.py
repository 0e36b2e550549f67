"""From logged rewards to changes of ln pi in nats.

A trainer with a reference logs rewards = beta (ln pi - ln pi_ref), whatever its loss (TRL dpo_trainer.py, OpenRLHF
DPOLoss, LLaMA-Factory): the change is reward / beta. One without logs beta ln pi, from which only differences between
two times of the same pairs tell a change. Some log means per token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sims.diagnosis.logs import Log

REFERENCE_FREE = ("simpo", "orpo", "cpo", "alphapo")
PER_TOKEN = ("simpo", "orpo", "alphapo")  # ln pi / length, in TRL and LLaMA-Factory alike; ipo depends on the trainer
USUAL_BETA = 0.1  # TRL's default: converts thresholds where beta is unknown, never values
PER_TOKEN_SHARE = 0.1  # of a limit in nats per response where values are per token: for responses of ten or more
RESIDUAL = 0.02  # of a fit of rewards to log-probabilities that counts as exact, for logs printed with four digits
PRINTED = 1e-3  # relative rounding of printed values


@dataclass(frozen=True)
class Scale:
    """How logged values become changes of ln pi.

    beta : None if unknown. source : where it is from. metric : the prefix of the metrics used, "reward" or "logp".
    reference : the values are against a reference model, so that no change is 0. unit : of the result.
    """

    beta: float | None
    source: str
    metric: str
    reference: bool
    unit: str
    notes: tuple[str, ...] = ()

    @property
    def factor(self) -> float:
        return 1.0 if self.metric == "logp" or self.beta is None else 1.0 / self.beta

    @property
    def nats(self) -> bool:
        """Values are ln pi, not beta ln pi."""
        return self.metric == "logp" or self.beta is not None

    def limit(self, nats: float) -> float:
        """A limit in nats per response in this unit."""
        return nats * (1.0 if self.nats else USUAL_BETA) * (PER_TOKEN_SHARE if "token" in self.unit else 1.0)


def scale_of(log: Log, beta: float | None, loss: str | None, per_token: bool) -> Scale:
    """What the log, what stands beside it and the user's flags say about its units; ValueError for a beta <= 0."""
    beta, source = _given(log, beta)
    losses = loss_names(loss or log.settings.get("loss"))
    notes = []
    free_beta = _proportional(log)
    free = free_beta is not None or any(name in REFERENCE_FREE for name in losses)
    has_rewards = any("reward_chosen" in p.values for p in log.points)
    if free and free_beta is not None:
        beta, source = free_beta, "exact, from rewards and log-probabilities"
        notes.append("rewards are beta times the log-probabilities themselves: the loss has no reference model")
        if not per_token and not losses:
            notes.append("SimPO and ORPO log means per token: with them, add --loss simpo or --loss orpo")
    inferred = None if free else _inferred(log)
    if inferred is not None:
        if beta is not None and abs(inferred / beta - 1) > 3 * RESIDUAL:
            notes.append(
                f"beta = {beta:g} ({source}) does not fit the log: its evaluations give {inferred:.4g}, which is used "
                "(TRL before 0.29 multiplies rewards by the sum of loss_weights)"
            )
            beta = None
        if beta is None:
            beta, source = inferred, "exact, from rewards and log-probabilities of the evaluations"
    logged = any("logp_chosen" in p.values for p in log.points)
    metric = "logp" if logged and (free or not has_rewards) else "reward"
    if not has_rewards and not free:
        notes.append("no rewards in the log: changes are against its first entries")
    token = per_token or _per_token(log, losses)
    if loss and "ipo" in losses and not token:
        notes.append(
            "--loss ipo changes nothing here: by what is logged these are sums over a response, as in TRL from 0.29 on "
            "and OpenRLHF; --per_token if they are means"
        )
    if ld := log.settings.get("ld_alpha"):
        notes.append(f"ld_alpha = {ld}: tokens past the shorter response's length count {ld} in these numbers")
    unit = "nats" if metric == "logp" or beta is not None else "units of reward"
    return Scale(beta, source, metric, has_rewards and not free, unit + (" per token" if token else ""), tuple(notes))


def _given(log: Log, beta: float | None) -> tuple[float | None, str]:
    source = "given"
    if beta is None and isinstance(log.settings.get("beta"), int | float):
        beta, source = float(log.settings["beta"]), "from the arguments beside the log"
    if beta is not None and not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be a finite number > 0, got {beta:g} ({source})")
    return beta, source if beta is not None else "unknown"


def loss_names(loss: Any) -> list[str]:
    """The names in a setting: a list, or text with commas."""
    parts = loss if isinstance(loss, Sequence) and not isinstance(loss, str) else str(loss or "").split(",")
    return [str(p).strip().lower() for p in parts if str(p).strip()]


def _per_token(log: Log, losses: list[str]) -> bool:
    """ipo: sums in TRL from 0.29 on (it logs entropy) and OpenRLHF (no log-probabilities); else means per token."""
    seen = {metric for p in log.points for metric in p.values}
    ipo = "logp_chosen" in seen and "entropy" not in seen
    return any(name in PER_TOKEN or (name == "ipo" and ipo) for name in losses)


def _sides(log: Log, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rewards, log-probabilities) of chosen and rejected where both are there."""
    tables = [log.together(split, f"reward_{side}", f"logp_{side}") for side in ("chosen", "rejected")]
    return [(t[:, 1], t[:, 2]) for t in tables if len(t)]


def _proportional(log: Log) -> float | None:
    """beta of a log whose rewards are beta times the log-probabilities, None if they are not."""
    pairs = [side for split in log.splits for side in _sides(log, split)]
    if not pairs:
        return None
    reward, logp = (np.concatenate(column) for column in zip(*pairs, strict=True))
    if len(reward) < 3 or np.ptp(logp) <= 10 * PRINTED * np.abs(logp).max() or not (logp * reward).sum() > 0:
        return None
    beta = float((reward * logp).sum() / (logp * logp).sum())
    return beta if (np.abs(reward - beta * logp) <= 2 * PRINTED * np.abs(reward) + 1e-12).all() else None


def _inferred(log: Log) -> float | None:
    """beta = d reward / d ln pi on an evaluation set, the same pairs each time; None unless that is one number."""
    x, y = [], []
    for split in log.splits:
        if split != "train":
            for reward, logp in _sides(log, split):
                x.append(logp - logp.mean())
                y.append(reward - reward.mean())
    if not x:
        return None
    dx, dy = np.concatenate(x), np.concatenate(y)
    if not (dx**2).sum() > 0 or not (dy**2).sum() > 0:
        return None
    beta = float((dx * dy).sum() / (dx**2).sum())
    return beta if beta > 0 and np.sqrt(((dy - beta * dx) ** 2).sum() / (dy**2).sum()) < RESIDUAL else None

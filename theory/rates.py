"""Instantaneous rates of log-probabilities, term by term as the paper names them (Razin et al., Theorems 4 and 5).

    d/dt ln pi(y+) = G [ m - (1 - pi+ + pi-) <W_+, W_-> - sum_z pi(z) <W_z, W_+ - W_-> ],
    m = (1 - pi+) |W_+|^2 + pi- |W_-|^2 + (1 - pi+ + pi-) |h|^2                            (Theorem 4)
    d/dt ln pi(z)  = G [ <W_z, W_+ - W_-> + (pi- - pi+) |h|^2 - sum_z' pi(z') <W_z', W_+ - W_-> ]   (Theorem 5)

The sum over z in Theorem 4 runs over tokens other than y+ and y-. Terms that come from moving h carry eta_h, those from
moving W carry eta_W.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from theory._check import check_number
from theory.exact import margin_form
from theory.losses import Loss
from theory.model import UnconstrainedFeatures, inner_products, token_index
from theory.path import RATE

Array = NDArray[np.float64]


@dataclass(frozen=True, repr=False)
class Rate:
    """d/dt ln pi(response), in nats per unit of time, as a sum of named terms (each already times G and its rate).

    sensitivity : derivative of the rate in one inner product with everything else (probabilities included) held fixed:
        the sign of each is what the paper's Theorems 1 and 2 state in words.
    """

    response: str
    terms: dict[str, float]
    sensitivity: dict[str, float]

    @property
    def total(self) -> float:
        return float(sum(self.terms.values()))

    def to_dict(self) -> dict[str, Any]:
        return {"response": self.response, "total": self.total, "terms": self.terms, "sensitivity": self.sensitivity}

    def __repr__(self) -> str:
        return str(self)  # a notebook or a prompt shows the table

    def __str__(self) -> str:
        rows = "\n".join(f"  {name:28} {value:+.6g}" for name, value in self.terms.items())
        return f"d/dt ln pi({self.response}) = {self.total:+.6g}\n{rows}"


def log_prob_rate(
    model: UnconstrainedFeatures,
    loss: Loss,
    response: int | str | None = None,
    sample: int = 0,
    *,
    lr_unembedding: float = 1.0,
    lr_hidden: float = 1.0,
) -> Rate:
    """The rate of ln pi(response) under gradient flow at the model's parameters.

    response : a token (index or name); default the preferred one. Single-token models only.
    """
    plus, minus = model.single_pair
    if sample != 0:
        raise ValueError(f"sample must be 0 for a model with one sample, got {sample!r}")
    z = plus if response is None else token_index(response, model.tokens, "response")
    if not 0 <= z < model.V:
        raise ValueError(f"response must be a token index in [0, {model.V}), got {z}")
    eta_W = check_number(lr_unembedding, "lr_unembedding", RATE)
    eta_h = check_number(lr_hidden, "lr_hidden", RATE)
    h = model.h.astype(np.float64)
    W_plus, W_minus = (model.W[y].astype(np.float64) for y in (plus, minus))
    products = inner_products(model.W, np.stack([h, W_plus - W_minus], axis=1))
    p = np.exp(log_softmax(products[:, 0]))
    along = products[:, 1]  # <W_z, W_+ - W_->
    G = float(margin_form(model, loss).slope(products[plus, 0] - products[minus, 0]))
    others = np.ones(model.V, dtype=bool)
    others[[plus, minus]] = False
    weighted = float(p[others] @ along[others])
    rest = float(np.delete(p, plus).sum())  # 1 - pi+, with its digits as pi+ -> 1
    mass = rest + float(p[minus])
    name = model.name(z)
    body = G * eta_h
    if z == plus:
        terms = {
            "norms of W_+ and W_-": body * float(rest * W_plus @ W_plus + p[minus] * W_minus @ W_minus),
            "alignment of W_+ and W_-": -body * mass * float(W_plus @ W_minus),
            "other tokens, weighted": -body * weighted,
            "hidden norm": G * eta_W * mass * float(h @ h),
        }
        sensitivity = {
            "<W_+, W_->": -body * mass,
            "|W_+|^2": body * rest,
            "|W_-|^2": body * float(p[minus]),
            "|h|^2": G * eta_W * mass,
        }
        sensitivity |= {
            f"<W_{model.name(int(v))}, W_+ - W_->": -body * float(p[v])
            for v in np.nonzero(others)[0][np.argsort(-p[others])][:20]
        }
        return Rate(name, terms, sensitivity)
    # In Theorem 5 the sum over z' runs over every token, y+ and y- included.
    terms = {
        "alignment with W_+ - W_-": body * float(along[z]),
        "mean alignment": -body * float(p @ along),
        "hidden norm": G * eta_W * float(p[minus] - p[plus] - (z == minus)) * float(h @ h),
    }
    sensitivity = {
        f"<W_{name}, W_+ - W_->": body * float(1 - p[z]),
        "|h|^2": G * eta_W * float(p[minus] - p[plus] - (z == minus)),
    }
    return Rate(name, terms, sensitivity)

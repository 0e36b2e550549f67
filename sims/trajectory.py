"""The record that gradient flow and discrete training both return."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from theory.model import UnconstrainedFeatures

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Parameters of a simulated run at T points.

    times (T,): time of a flow, or the number of steps taken. W (T, V, d), H (T, n, d).
    """

    model: UnconstrainedFeatures
    times: Array
    W: Array
    H: Array
    method: str

    def at(self, i: int) -> UnconstrainedFeatures:
        """The model at point i, references frozen."""
        return self.model.with_parameters(self.W[i], self.H[i])

    def next_token_log_probs(self, prompt: Hashable | None = None, prefix: tuple[int, ...] = ()) -> Array:
        """(T, V) ln pi(. | prompt, prefix); default: the first sample's prompt."""
        prompt = self.model.samples[0].prompt if prompt is None else prompt
        row = self.model.context_row(prompt, prefix)
        return log_softmax(np.einsum("tvd,td->tv", self.W, self.H[:, row]), axis=-1)

    def log_probs(self, response: Iterable[int] | int | None = None, prompt: Hashable | None = None) -> Array:
        """(T,) ln pi(response | prompt), nats; default: y+ of the first sample."""
        y = self.model.samples[0].preferred if response is None else response
        y = (int(y),) if isinstance(y, int | np.integer) else tuple(int(t) for t in y)
        if not y or not all(0 <= t < self.model.V for t in y):
            raise ValueError(f"response must hold token indices in [0, {self.model.V}), got {y!r}")
        total = np.zeros(len(self.times))
        for k, t in enumerate(y):
            total += self.next_token_log_probs(prompt, y[:k])[:, t]
        return total

    def margin(self, sample: int = 0) -> Array:
        """(T,) ln pi(y+) - ln pi(y-) of a sample."""
        s = self.model.samples[sample]
        return self.log_probs(s.preferred, s.prompt) - self.log_probs(s.dispreferred, s.prompt)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for saving."""
        return {"method": self.method, "times": self.times.tolist(), "W": self.W.tolist(), "H": self.H.tolist()}

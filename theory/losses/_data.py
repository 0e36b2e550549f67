"""What a formula is given: log-probabilities of a pair, or all responses of a sample token by token."""

from typing import Any, NamedTuple, Self


class Pair(NamedTuple):
    """Log-probabilities of one sample (nats, summed over tokens); scalars, arrays, tensors or symbols."""

    a: Any  # ln pi(y+ | x)
    b: Any  # ln pi(y- | x)
    a_ref: Any = 0.0  # the same under the reference model
    b_ref: Any = 0.0
    n_w: Any = 1  # |y+|, tokens
    n_l: Any = 1  # |y-|
    norm_ratio: Any = 1.0  # |grad ln pi(y-)| / |grad ln pi(y+)| of the model; only calibrated losses look at it

    @property
    def da(self) -> Any:
        """The log-ratio of y+ to the reference model, ln pi(y+) - ln pi_ref(y+)."""
        return self.a - self.a_ref

    @property
    def db(self) -> Any:
        """The log-ratio of y-."""
        return self.b - self.b_ref

    @property
    def u(self) -> Any:
        """The margin ln pi(y+) - ln pi(y-)."""
        return self.a - self.b

    @property
    def u_ref(self) -> Any:
        """The margin of the reference model."""
        return self.a_ref - self.b_ref

    @property
    def m(self) -> Any:
        """u - u_ref."""
        return self.u - self.u_ref

    @classmethod
    def of_margin(cls, u: Any, u_ref: Any = 0.0) -> Self:
        """A pair with the given margins, for losses that see nothing else."""
        return cls(u, 0.0, u_ref, 0.0)


class Tokens(NamedTuple):
    """One response, token by token; arrays or tensors whose last axis is the n positions."""

    log_prob: Any  # (..., n) ln pi(y_t | x, y_<t)
    ref: Any  # (..., n) the same under the reference model
    kl: Any  # (..., n) KL(pi_ref || pi) of the next-token distributions, nats
    log_sum_sq: Any  # (..., n) ln sum_v pi(v | x, y_<t)^2
    hidden: Any  # (..., n, d) hidden vectors of the reference model

    @property
    def n(self) -> int:
        """|y|, the number of tokens."""
        return int(self.log_prob.shape[-1])

    @property
    def log_ratio(self) -> Any:
        """(..., n) ln pi(y_t) - ln pi_ref(y_t)."""
        return self.log_prob - self.ref


class Group(NamedTuple):
    """All responses of one sample, y+ first and y- second, with their rewards."""

    responses: tuple[Tokens, ...]
    rewards: tuple[float, ...]

    @property
    def pair(self) -> Pair:
        """Log-probabilities of y+ and y-, summed over tokens."""
        w, l = self.responses[:2]
        return Pair(w.log_prob.sum(-1), l.log_prob.sum(-1), w.ref.sum(-1), l.ref.sum(-1), w.n, l.n)

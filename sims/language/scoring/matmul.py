"""Matrix products on a CPU by the faster library."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.parameter import Parameter
from torch.overrides import TorchFunctionMode


class Products(TorchFunctionMode):
    """Inside, linear layers in float32 on a CPU go through oneDNN in place of MKL.

    On processors that are not Intel's, MKL keeps to half of the vector width: 75 against 175 GFLOP/s on one core of an
    AMD EPYC; on Intel's both are alike. Nothing is kept: a layer's weights are laid out anew for every batch, which
    costs little beside a batch of a thousand tokens. Everything else is left alone.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is linear and not kwargs and torch.backends.mkldnn.is_available() and _plain(args[0], *args[1:]):
            x, W, *bias = args
            return func(x.to_mkldnn(), W.to_mkldnn(), *bias).to_dense()
        return func(*args, **(kwargs or {}))


def _plain(x: Tensor, *weights: Tensor | None) -> bool:
    """Ordinary float32 tensors on a CPU, and something to do."""
    given = [x, *(w for w in weights if w is not None)]
    ordinary = all(
        type(t) in (Tensor, Parameter) and t.dtype == torch.float32 and t.device.type == "cpu" for t in given
    )
    return ordinary and x.dim() > 1 and x.numel() > 0 and not torch.is_grad_enabled()

"""Activation functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from converters.coreml.read.ops.registry import UnsupportedForm, op


@op("relu")
def relu(x: Tensor) -> Tensor:
    """Clamp from below at 0."""
    return x.clamp(min=0)


@op("relu6")
def relu6(x: Tensor) -> Tensor:
    """Clamp to [0, 6]."""
    return x.clamp(0, 6)


@op("clamped_relu")
def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Leaky ReLU, clamped from above at beta."""
    return torch.where(x >= 0, x, alpha * x).clamp(max=beta)


@op("leaky_relu")
def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    """Scale negative values by alpha."""
    return torch.where(x >= 0, x, alpha * x)


@op("prelu")
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """Scale negative values by alpha [channels], along axis 1."""
    slope = alpha.view(-1, *[1] * (x.dim() - 2))  # one slope a channel, axis 1 of x
    return torch.where(x >= 0, x, slope * x)


@op("thresholded_relu")
def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    """Zero below alpha."""
    return torch.where(x >= alpha, x, torch.zeros_like(x))


@op("elu")
def elu(x: Tensor, alpha: float) -> Tensor:
    """Replace negative values by alpha * (exp(x) - 1)."""
    return torch.where(x > 0, x, alpha * torch.expm1(x))


@op("gelu")
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    """Gaussian error linear unit: exact, or the approximation by tanh or by sigmoid."""
    if mode == "EXACT":
        return F.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return F.gelu(x, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    raise UnsupportedForm(f"mode {mode!r}")


@op("silu")
def silu(x: Tensor) -> Tensor:
    """Product x * sigmoid(x)."""
    return F.silu(x)


@op("sigmoid")
def sigmoid(x: Tensor) -> Tensor:
    """Logistic function."""
    return x.sigmoid()


@op("sigmoid_hard")
def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Clamp alpha * x + beta to [0, 1]."""
    return (alpha * x + beta).clamp_(0, 1)


@op("linear_activation")
def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Line alpha * x + beta."""
    return alpha * x + beta


@op("scaled_tanh")
def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Product alpha * tanh(beta * x)."""
    return alpha * torch.tanh(beta * x)


@op("softplus")
def softplus(x: Tensor) -> Tensor:
    """Logarithm log(1 + exp(x))."""
    return torch.logaddexp(x, torch.zeros_like(x))


@op("softplus_parametric")
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """alpha * log(1 + exp(beta * x)), with alpha and beta [channels] along axis 1."""
    around = (-1, *[1] * (x.dim() - 2))
    scaled = beta.view(around) * x
    return alpha.view(around) * torch.logaddexp(scaled, torch.zeros_like(scaled))


@op("softsign")
def softsign(x: Tensor) -> Tensor:
    """Quotient x / (1 + |x|)."""
    return x / (1 + x.abs())


@op("softmax")
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """Exponentials normalized to a sum of 1 along `axis`."""
    return torch.softmax(x, axis)

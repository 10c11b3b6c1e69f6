"""transformers' Conv1D, the linear layer of GPT-2.

Its weight is [in, out]. Checkpoints, decoders and artifacts hold it turned, as a Linear's: [out, in]. This is so for
dense weights too, since the shape of a square one does not tell.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["as_linear", "conv1d_weights", "held_weight", "is_conv1d"]


def is_conv1d(module: nn.Module) -> bool:
    """Tell a Conv1D by its name, so that transformers need not be imported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def conv1d_weights(model: nn.Module) -> frozenset[str]:
    """Names of the weights that the model holds as [in, out]."""
    return frozenset(f"{name}.weight" for name, module in model.named_modules() if is_conv1d(module))


def held_weight(module: nn.Module) -> Tensor:
    """The weight of a layer as checkpoints hold it, [out, in, ...], detached."""
    weight = module.get_parameter("weight").data
    return weight.t().contiguous() if is_conv1d(module) else weight


def as_linear(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the Conv1D weights in parameters of a model; from the model's form to the checkpoint's and back."""
    turned = conv1d_weights(model)
    return {name: tensor.t().contiguous() if name in turned else tensor for name, tensor in state.items()}

"""Any module with the weights of a checkpoint: what its export is compared with."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import InputError
from edkm_export.reference.conv1d import as_linear

__all__ = ["decoded_module"]

_Module = TypeVar("_Module", bound=nn.Module)


@torch.no_grad()
def decoded_module(checkpoint: Checkpoint, module: _Module) -> _Module:
    """A copy of a module that holds the decoded weights of a checkpoint.

    Args:
        checkpoint: palettized from a module of the same parameters.
        module: is left as it is.

    Returns:
        The copy in float32 on the CPU, in eval mode, without gradients; every floating-point parameter and buffer of
        the checkpoint is in it.

    Raises:
        InputError: the module has other parameters, or other shapes.

    Example:
        >>> decoded = edkm_export.decoded_module(checkpoint, cnn)
        >>> logits = decoded(image)
    """
    where = type(module).__name__
    clone = copy.deepcopy(module).to("cpu", torch.float32).eval().requires_grad_(False)
    own = as_linear(clone, clone.state_dict())
    state = checkpoint.state_dict()
    for name, tensor in state.items():
        found = own.get(name)
        if found is None or found.shape != tensor.shape:
            shape = "no parameter" if found is None else f"of shape {list(found.shape)}"
            raise InputError(
                f"{where}: {name} is {shape}, but {list(tensor.shape)} in the checkpoint: it is another module."
            )
    parameters = {name for name, _ in clone.named_parameters(remove_duplicate=False)}
    if missing := sorted(parameters - state.keys()):
        raise InputError(f"{where}: {missing[0]} is not in the checkpoint: it is another module.")
    clone.load_state_dict(as_linear(clone, state), strict=False)
    return clone

"""States: tensors that outlive a run."""

from __future__ import annotations

from torch import Tensor

from converters.coreml.read.ops.registry import Call, StateCell, op


@op("read_state", moves=True)
def read_state(input: StateCell, call: Call) -> Tensor:
    """Hand out the tensor of a state; not a copy, see `plan` for why that is safe."""
    return input.tensor.to(call.precision.carrier(call.op.outputs[0].type.dtype))


@op("write_state")
def write_state(input: StateCell, data: Tensor) -> None:
    """Replace the tensor of a state; nothing to do after an update in place."""
    if list(data.shape) != list(input.tensor.shape):
        raise ValueError(
            f"data has shape {list(data.shape)}, state {input.name!r} has {list(input.tensor.shape)}"
        )
    if data.data_ptr() != input.tensor.data_ptr() or data.stride() != input.tensor.stride():
        input.tensor = data.to(input.tensor.dtype, copy=True)


@op("coreml_update_state")
def coreml_update_state(state: StateCell, value: Tensor) -> Tensor:
    """Write and read a state in one; a fresh copy."""
    write_state(state, value)
    return value.clone()

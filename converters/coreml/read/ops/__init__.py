"""The operations of MIL that the interpreter supports, one file per family.

Semantics are those of the op documentation of coremltools (`converters/mil/mil/ops/defs`). `registry` tells
how to add one.
"""

from __future__ import annotations

from converters.coreml.read.ops import (  # noqa: F401  (importing registers the ops)
    activation,
    arithmetic,
    classification,
    comparison,
    constexpr,
    control_flow,
    convolution,
    creation,
    detection,
    dot_product_attention,
    gathering,
    joining,
    listing,
    normalization,
    pooling,
    product,
    quantization,
    random_draws,
    rearranging,
    recurrent,
    reduction,
    resampling,
    reshaping,
    resizing,
    slicing,
    sorting,
    state,
)
from converters.coreml.read.ops.registry import (
    FAULTS,
    Call,
    OpDefinition,
    StateCell,
    TensorList,
    UnsupportedForm,
    definition_of,
    explained,
    known_ops,
    located,
)

__all__ = [
    "FAULTS",
    "Call",
    "OpDefinition",
    "StateCell",
    "TensorList",
    "UnsupportedForm",
    "definition_of",
    "explained",
    "known_ops",
    "located",
]

"""Writing a planned graph and its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from converters.onnx.format import DATA_FILE, MODEL_FILE
from converters.onnx.write.export_plan import OnnxPlan
from edkm_export.activity import tracked
from edkm_export.interrupts import check_interrupt

__all__ = ["write_graph"]


def write_graph(plan: OnnxPlan, folder: Path) -> Path:
    """Write model.onnx and its external data; weights pass through memory one at a time.

    Args:
        plan: from `plan_onnx`.
        folder: exists.

    Returns:
        Path of the model.
    """
    with (folder / DATA_FILE).open("wb") as file:
        for offset, weight in tracked(plan.weights, "writing", "weights"):
            check_interrupt()
            file.write(bytes(offset - file.tell()))
            array = weight.produce()
            assert array.dtype == weight.dtype and array.shape == weight.shape, weight.name
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    model = folder / MODEL_FILE
    model.write_bytes(plan.model.SerializeToString())
    return model

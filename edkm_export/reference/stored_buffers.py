"""Numbers of a model that are stored with its weights but are no parameters of it, such as Gemma 4's `layer_scalar`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing it takes torch, which a wrong path must not wait for
    from torch import Tensor

__all__ = ["stored_buffers"]


def stored_buffers(model: Any) -> dict[str, Tensor]:
    """{name: buffer} of those that `state_dict` holds and that are floating point."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set or not buffer.is_floating_point():
                continue
            found[f"{path}.{name}" if path else name] = buffer
    return found

"""Tests whose expectation does not hold for the interpreter, each with the reason; they are counted apart."""

from __future__ import annotations

__all__ = ["known_reason"]

# Part of the name of the test, and why it fails.
_KNOWN = (
    (
        "ops/tests/iOS15/test_image_resizing.py::TestCropResize::test_builder_to_backend_smoke",
        "gives crop_resize a normalized box outside of the image, and expects the whole image; the test for iOS 17 "
        "expects padding there, as the interpreter does",
    ),
    (
        "TestStack::test_stack_dynamic_range_dim",
        "expects Core ML to refuse shapes that agree at run time only; the interpreter computes the result",
    ),
)


def known_reason(test: str) -> str | None:
    """Why a test that failed does not count; None for any other."""
    return next((reason for name, reason in _KNOWN if name in test), None)

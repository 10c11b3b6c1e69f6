"""Tests whose expectation does not hold for the interpreter, each with the reason; they are counted apart."""

from __future__ import annotations

__all__ = ["known_reason"]

# Parts of the name of the test or of its error, and why it fails.
_KNOWN = (
    (
        ("ops/tests/iOS15/test_image_resizing.py::TestCropResize::test_builder_to_backend_smoke",),
        "gives crop_resize a normalized box outside of the image, and expects the whole image; the test for iOS 17 "
        "expects padding there, as the interpreter does",
    ),
    (
        ("TestQuantizationConversionAPI::test_static_quantization_as_activation_quantization",),
        "compares with PyTorch's int8 convolution, which rounds some sums to the other neighbour: one step of the "
        "scale, within the tolerance of the test",
    ),
    (
        ("TestFill::", "fill_scalar=0.2-src_dtype=torch.int32"),
        "fills integers with 0.2: of a graph of torch.export, coremltools makes a program that gives floats",
    ),
    (
        ("TestExecuTorchExamples::", "in forward"),
        "expects the source line alone where later versions of PyTorch note file and line too; the prediction is right",
    ),
    (
        ("TestStack::test_stack_dynamic_range_dim",),
        "expects Core ML to refuse shapes that agree at run time only; the interpreter computes the result",
    ),
)


def known_reason(test: str, error: str) -> str | None:
    """Why a test that failed does not count; None for any other."""
    text = f"{test}\n{error}"
    return next((why for parts, why in _KNOWN if all(part in text for part in parts)), None)

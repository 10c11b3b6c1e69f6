"""What coremltools and its tests ask of the machine: a Mac with macOS 15, Core ML, and quick garbage collection."""

from __future__ import annotations

import gc
import importlib.machinery
import platform
import sys
import types
from typing import Any

import numpy as np
import pytest

from converters.coreml.backend import load_coremltools
from tests.coremltools_suite.predictor import Predictor
from tests.coremltools_suite.tensorflow_standin import FUNCTIONS

__all__ = ["Mismatch", "collect_garbage", "compare", "install", "seed"]

collect_garbage = gc.collect
# Programs with float16 in them are compared at this: weights and expected values are rounded, at 2**-11 each, and the
# suite itself would take 0.5.
WIDEST = 5e-3
# With this the suite says that it compares no values, such as random ones.
_ANY_VALUE = 10.0


class Mismatch(Exception):
    """A prediction differs from what the test expects by more than our tolerance.

    No AssertionError, because the suite's comparison of compressed models swallows those.
    """


def install() -> None:
    """Make coremltools predict, and its tests believe that they run on a Mac."""
    ct = load_coremltools()
    from coremltools import _deps
    from coremltools.models import _compiled_model, model, utils

    def version() -> tuple[int, int]:
        return (15, 0)

    for module in (utils, model, _compiled_model):
        module._is_macos = lambda: True
        module._macos_version = version
    _deps._IS_MACOS = True
    platform.machine = lambda: "arm64"  # some tests predict on Apple silicon only
    model._MLModelProxy = _compiled_model._MLModelProxy = Predictor
    assert ct.models.model is model
    if not _deps._HAS_TORCH_VISION:
        sys.modules["torchvision"] = _Absent(
            "torchvision", "its wheel on Linux does not go with PyTorch for the CPU"
        )
    if not _deps._HAS_TF:
        standin = sys.modules["tensorflow"] = _Absent("tensorflow", "only a stand-in is installed")
        standin.__dict__.update(FUNCTIONS)
        _deps._HAS_TF_2 = True
    gc.collect = lambda *generations: 0  # the plugin collects at its own pace
    np.testing.assert_allclose = compare


class _Absent(types.ModuleType):
    """Stands in for a package that many modules of the suite import and few of their tests use."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__dict__["_why"] = why

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        pytest.skip(f"needs {self.__name__}: {self.__dict__['_why']}", allow_module_level=True)


def seed() -> None:
    """The same inputs for a test whichever others run before it."""
    import torch

    np.random.seed(1984)
    torch.manual_seed(1984)


_assert_allclose = np.testing.assert_allclose


def compare(
    actual: Any, desired: Any, rtol: float = 1e-7, atol: float = 0, *args: Any, **options: Any
) -> None:
    """numpy's comparison; of a prediction with another's value, at our tolerance where float16 takes part and never
    wider. Of two predictions, such as those before and after compression, at the tolerance of the test."""
    diary = Predictor.diary
    if diary.made(actual, desired) == 2 or max(rtol, atol) >= _ANY_VALUE:
        return _assert_allclose(actual, desired, rtol, atol, *args, **options)
    if diary.rounded(actual, desired):
        rtol = atol = WIDEST
    elif not diary.predictions or max(rtol, atol) <= WIDEST:
        return _assert_allclose(actual, desired, rtol, atol, *args, **options)
    try:
        _assert_allclose(actual, desired, min(rtol, WIDEST), min(atol, WIDEST), *args, **options)
    except AssertionError as error:
        raise Mismatch(str(error)) from error

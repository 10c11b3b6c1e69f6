"""One package of several functions that share their weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.coreml.backend import load_coremltools, model_message, quiet
from converters.coreml.read.layout import PackageLayout

__all__ = ["merge_functions"]


def merge_functions(packages: Mapping[str, Path], default: str, path: Path) -> None:
    """Write a package whose functions are the main functions of others; equal constants are stored once.

    Args:
        packages: {name of the function: its package}. The user-defined metadata is that of the default one.
        default: function that runs unless another is asked for.
        path: the .mlpackage, which must not exist.
    """
    ct = load_coremltools()
    with quiet():
        descriptor = ct.utils.MultiFunctionDescriptor()
        for name, package in packages.items():
            descriptor.add_function(str(package), src_function_name="main", target_function_name=name)
        descriptor.default_function_name = default
        ct.utils.save_multifunction(descriptor, str(path))
    kept = _read(packages[default]).description.metadata
    model_file = PackageLayout.open(path).model_file
    model = _read(path)
    model.description.metadata.CopyFrom(kept)  # coremltools keeps none
    model_file.write_bytes(model.SerializeToString())


def _read(package: Path) -> Any:
    model = model_message()
    model.ParseFromString(PackageLayout.open(package).model_file.read_bytes())
    return model

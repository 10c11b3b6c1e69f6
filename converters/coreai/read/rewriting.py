"""Programs made from a program on disk, for checks that the file itself would take too long for.

The runtime for Linux decodes every palette at every call, and multiplies float16 matrices with a float16 accumulator.
The *twin* is the program of the file, loaded and rewritten by Apple's package in two places: each palette is replaced
by its dense weight, as our reader decodes it, and each product of float16 matrices is computed in float32 and rounded
once. Everything else is as the file has it. A twin that is *observed* also gives what happens inside of it, for
localization.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from converters.coreai.backend import load_authoring
from converters.coreai.read.asset import Asset, load_asset
from converters.coreai.read.observing import observe
from converters.coreai.read.weights import StoredPalette
from edkm_export.errors import PackageError

__all__ = ["write_decoders", "write_twin"]

_LUT_TO_DENSE = "coreai.lut_to_dense"
_PRODUCTS = ("coreai.decomposable.broadcasting_batch_matmul", "coreai.batch_matmul")
_GRAPH, _PRIVATE = "coreai.graph", "priv"


def write_twin(path: Path, output: Path, *, observed: bool = False) -> dict[str, dict[str, str]]:
    """Write the twin of an asset.

    Args:
        path: of the asset.
        output: of the twin, ending in .aimodel; does not exist.
        observed: its functions also give the value of each operation.

    Returns:
        {function: {output: operation that makes it}} of the values that are given besides, in order.

    Raises:
        PackageError: Apple's package and our reader see different palettes.
    """
    core = load_authoring()
    asset = load_asset(path)
    palettes = asset.palettes()
    program = core.Asset.load(path).program
    module = program._module._mlir_module  # no public way to its operations
    lookups: list[Any] = []
    products: list[Any] = []
    functions: list[Any] = []

    def visit(operation: Any) -> Any:
        if operation.name == _GRAPH and _PRIVATE not in operation.attributes:
            functions.append(operation)
        if operation.name == _LUT_TO_DENSE:
            lookups.append(operation)
        elif operation.name in _PRODUCTS and operation.parent.name == _GRAPH:
            products.append(operation)
        return core.ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    if len(lookups) != len(palettes):
        raise PackageError(
            f"{path}: our reader finds {len(palettes)} palettes, Apple's package {len(lookups)}."
        )
    with module.context, core.ir.Location.unknown():
        weights = [
            _replace_palette(core, operation, palette)
            for operation, palette in zip(lookups, palettes, strict=True)
        ]
        for operation in products:
            _widen_product(core, operation)
        named = list(zip(weights, _names(asset, palettes), strict=True))
        values = {
            str(function.attributes["sym_name"].value): observe(core, function, named)
            for function in functions
            if observed
        }
    program.save_asset(output)
    return values


def _names(asset: Asset, palettes: Sequence[StoredPalette]) -> list[str]:
    """Of the parameter that each palette holds."""
    told = {entry.digest: name for name, entry in asset.description.palettized.items()}
    return [told.get(palette.digest, "") for palette in palettes]


def _replace_palette(core: Any, operation: Any, palette: StoredPalette) -> Any:
    result = operation.results[0]
    shape = palette.dense_shape
    if tuple(result.type.shape) != shape:
        raise PackageError(
            f"a palette decodes to {list(result.type.shape)} for Apple's package, to {list(shape)} for us."
        )
    weight = palette.tensor("weight", shape, palette.n_bits).decode().numpy()
    with core.ir.InsertionPoint(operation):
        constant = core.ops.ConstantOp(value=core.elements(result.type, weight)).result
    result.replace_all_uses_with(constant)
    operation.erase()
    return constant


def _widen_product(core: Any, operation: Any) -> None:
    result = operation.results[0]
    if str(result.type.element_type) != "f16":
        return
    with core.ir.InsertionPoint(operation):
        left, right = (core.ops.cast(operand, dtype=np.float32) for operand in operation.operands)
        wide = core.ops.broadcasting_batch_matmul(left, right)
        narrow = core.ops.cast(wide, dtype=np.float16)
    result.replace_all_uses_with(narrow)
    operation.erase()


def write_decoders(path: Path, output: Path) -> dict[str, str]:
    """Write a program with a function for each palette of an asset, that gives its dense weight.

    Args:
        path: of the asset; its palettes go in as our reader finds them on disk.
        output: of the new asset; does not exist.

    Returns:
        {name of the function: digest of the palette}.
    """
    core = load_authoring()
    from coreai.authoring.tensor_type import TensorType

    palettes = {palette.digest: palette for palette in load_asset(path).palettes()}
    names = {f"weight_{place}": digest for place, digest in enumerate(palettes)}
    module = core.Module.create()
    value = core.ir.Value

    def decoder(name: str, palette: StoredPalette) -> Callable[..., Any]:
        def body(x: Any) -> Any:
            return _lookup(core, palette)

        body.__name__ = name
        body.__annotations__ = {
            "x": Annotated[value, TensorType([1], np.float16, name="x")],
            "return": Annotated[value, TensorType(list(palette.dense_shape), np.float16, name="y")],
        }
        return body

    with module:
        for name, digest in names.items():
            core.ops.graph(decoder(name, palettes[digest]))
    core.Program(module).save_asset(output)
    return names


def _lookup(core: Any, palette: StoredPalette) -> Any:
    ops, n_bits = core.ops, palette.n_bits
    kind = core.ir.RankedTensorType.get(list(palette.index_shape), core.ir.IntegerType.get_unsigned(n_bits))
    packed = np.frombuffer(palette.indices, np.uint8)
    indices = ops.ConstantOp(
        value=core.elements(kind, packed.reshape(palette.index_shape) if n_bits == 8 else packed)
    ).result
    lut = ops.constant(np.ascontiguousarray(palette.lut))
    if palette.scale is not None:
        scale = palette.scale[:, :, None, None]
        none = np.zeros(scale.shape)
        lut = ops.blockwise_shift_scale(
            lut,
            ops.constant(scale),
            ops.constant(none.astype(np.int8)),
            ops.constant(-none.astype(np.float16)),
        )
    return ops.lut_to_dense(indices, lut, ops.constant(np.array(0, np.int16)))

"""Programs made from a program on disk, for checks that the file itself would take too long for.

The runtime for Linux decodes every palette at every call, and multiplies float16 matrices with a float16 accumulator.
The *twin* is the program of the file, loaded and rewritten by Apple's package: each palette is replaced by its dense
weight, as our reader decodes it, and each product of float16 matrices is computed in float32 and rounded once; the
weight of such a product is held in float32, which changes no value and saves a conversion at each call. Functions that
give no logits are left out. Everything else is as the file has it. A twin that is *observed* also gives what happens
inside of it, for localization.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from converters.coreai.backend import load_authoring
from converters.coreai.format import PROMPT
from converters.coreai.read.asset import Asset, load_asset
from converters.coreai.read.observing import observe
from converters.coreai.read.weights import StoredPalette
from edkm_export.errors import PackageError

__all__ = ["write_decoders", "write_twin"]

_LUT_TO_DENSE = "coreai.lut_to_dense"
_PRODUCTS = ("coreai.decomposable.broadcasting_batch_matmul", "coreai.batch_matmul")
_GRAPH, _PRIVATE = "coreai.graph", "priv"
# On the way from a weight to the product that it is for.
_TRANSPOSE = "coreai.transpose"
_MOVES = (_TRANSPOSE, "coreai.reshape", "coreai.expand_dims")
# The runtime reads a weight [in, out] once for each token: from memory, unless a cache holds it.
_LARGE_BYTES = 2 << 20
_BLOCK_COLUMNS = (256, 128, 64)


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
    prompts: list[Any] = []

    def visit(operation: Any) -> Any:
        if operation.name == _GRAPH and _PRIVATE not in operation.attributes:
            (prompts if _name(operation).startswith(PROMPT) else functions).append(operation)
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
    dense = _DenseWeights(core)
    with module.context, core.ir.Location.unknown():
        for operation, palette, name in zip(lookups, palettes, _names(asset, palettes), strict=True):
            if operation.parent not in prompts:
                dense.replace(operation, palette, name)
        for operation in products:
            if operation.parent not in prompts:
                _widen_product(core, operation, dense)
        weights = dense.used()
        values = {_name(function): observe(core, function, weights) for function in functions if observed}
        for operation in prompts:
            operation.erase()
    program.save_asset(output)
    return values


def _name(function: Any) -> str:
    return str(function.attributes["sym_name"].value)


def _names(asset: Asset, palettes: Sequence[StoredPalette]) -> list[str]:
    """Of the parameter that each palette holds."""
    told = {entry.digest: name for name, entry in asset.description.palettized.items()}
    return [told.get(palette.digest, "") for palette in palettes]


class _DenseWeights:
    """Decoded weights as constants of a program: float16 as the file has them, and float32 for products."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self._decoded: dict[tuple[Any, ...], Any] = {}  # attributes; many functions share a weight
        self._narrow: dict[Any, tuple[StoredPalette, str]] = {}
        self._wide: list[tuple[Any, str]] = []

    def replace(self, operation: Any, palette: StoredPalette, name: str) -> None:
        """Put a constant in the place of a lookup.

        Args:
            operation: the lookup, which is erased.
            palette: what it looks up.
            name: of the parameter.
        """
        result = operation.results[0]
        if tuple(result.type.shape) != palette.dense_shape:
            raise PackageError(
                f"a palette decodes to {list(result.type.shape)} for Apple's package, to {list(palette.dense_shape)} "
                "for us."
            )
        with self._core.ir.InsertionPoint(operation):
            constant = self._constant(palette, np.float16)
        result.replace_all_uses_with(constant)
        operation.erase()
        self._narrow[constant] = palette, name

    def widened(self, operand: Any) -> Any:
        """An operand of a product in float32: the weight itself where it is one, moved as it was; otherwise a cast."""
        constant, moves = _origin(operand)
        if constant not in self._narrow:
            return self._core.ops.cast(operand, dtype=np.float32)
        return self._widen(constant, moves)

    def in_blocks(self, operand: Any) -> Any | None:
        """A large weight [in, out] in float32 as blocks [blocks, in, columns]; None: it is none, or not large."""
        constant, moves = _origin(operand)
        shape = tuple(operand.type.shape)
        if constant not in self._narrow or len(shape) != 2 or 4 * shape[0] * shape[1] <= _LARGE_BYTES:
            return None
        columns = next((each for each in _BLOCK_COLUMNS if shape[1] % each == 0), None)
        if columns is None:
            return None
        blocks = shape[1] // columns
        split = _Move(None, (shape[0], blocks, columns)), _Move((1, 0, 2), (blocks, shape[0], columns))
        return self._widen(constant, (*moves, *split))

    def _widen(self, constant: Any, moves: tuple[_Move, ...]) -> Any:
        palette, name = self._narrow[constant]
        wide = self._constant(palette, np.float32, moves)
        self._wide.append((wide, name))
        return wide

    def used(self) -> list[tuple[Any, str]]:
        """Constants with the names of their parameters; those that nothing needs any more are erased."""
        found = list(self._wide)
        for constant, (_, name) in self._narrow.items():
            if _is_used(constant):
                found.append((constant, name))
            else:
                constant.owner.erase()
        return found

    def _constant(self, palette: StoredPalette, dtype: type, moves: tuple[_Move, ...] = ()) -> Any:
        core = self._core
        key = palette.digest, dtype, moves
        if key not in self._decoded:
            stored = palette.tensor("weight", palette.dense_shape, palette.n_bits)
            weight: NDArray[Any] = stored.decode().numpy().astype(dtype)
            for move in moves:
                weight = move.apply(weight)
            element = core.ir.F16Type.get() if dtype is np.float16 else core.ir.F32Type.get()
            kind = core.ir.RankedTensorType.get(list(weight.shape), element)
            self._decoded[key] = core.elements(kind, np.ascontiguousarray(weight))
        return core.ops.ConstantOp(value=self._decoded[key]).result


@dataclass(frozen=True)
class _Move:
    """What moves a weight on its way to a product.

    Attributes:
        axes: order of the axes of a transposition; None: a reshape.
        shape: afterwards.
    """

    axes: tuple[int, ...] | None
    shape: tuple[int, ...]

    @classmethod
    def of(cls, operation: Any) -> _Move:
        """From an operation of `_MOVES`."""
        axes = None
        if operation.name == _TRANSPOSE:
            axes = tuple(int(axis) for axis in np.array(operation.operands[1].owner.attributes["value"]))
        return cls(axes, tuple(operation.results[0].type.shape))

    def apply(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Of shape `shape`."""
        return weight.reshape(self.shape) if self.axes is None else weight.transpose(self.axes)


def _origin(operand: Any) -> tuple[Any, tuple[_Move, ...]]:
    """Where an operand is from, and the moves on its way."""
    moves: list[Any] = []
    value = operand
    while (made := value.owner) is not None and getattr(made, "name", "") in _MOVES:
        moves.append(made)
        value = made.operands[0]
    return value, tuple(_Move.of(move) for move in reversed(moves))


def _is_used(value: Any) -> bool:
    """Whether something needs a value; moves that nothing needs are erased."""
    for move in [use.owner for use in value.uses]:
        if move.name in _MOVES and not _is_used(move.results[0]):
            move.erase()
    return bool(list(value.uses))


def _widen_product(core: Any, operation: Any, weights: _DenseWeights) -> None:
    result = operation.results[0]
    if str(result.type.element_type) != "f16":
        return
    left, right = operation.operands
    with core.ir.InsertionPoint(operation):
        blocks = weights.in_blocks(right) if _is_one_text(left) else None
        if blocks is not None:
            narrow = _product_in_blocks(core, left, blocks, tuple(result.type.shape))
        else:
            wide = core.ops.broadcasting_batch_matmul(weights.widened(left), weights.widened(right))
            narrow = core.ops.cast(wide, dtype=np.float16)
    result.replace_all_uses_with(narrow)
    operation.erase()


def _is_one_text(value: Any) -> bool:
    """Whether a value is [tokens, in] or [1, tokens, in]."""
    shape = tuple(value.type.shape)
    return len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)


def _product_in_blocks(core: Any, left: Any, blocks: Any, shape: tuple[int, ...]) -> Any:
    """Float16 `shape`, free where it is negative: `left` by a weight of `_DenseWeights.in_blocks`."""
    ops = core.ops
    product = ops.broadcasting_batch_matmul(ops.cast(left, dtype=np.float32), blocks)
    narrow = ops.cast(product, dtype=np.float16)  # [blocks, tokens, columns]
    rows = ops.transpose(narrow, ops.constant(np.array([1, 0, 2], np.uint32)))
    return ops.reshape(rows, ops.constant(np.array([max(size, -1) for size in shape], np.int32)))


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

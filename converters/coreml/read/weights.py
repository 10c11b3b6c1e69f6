"""The weights of a function as they are stored: palettes, and dense constants."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from converters.coreml.format import PARAMETERS_KEY
from converters.coreml.read.constants import Constants
from converters.coreml.read.ops.constexpr import unpack_indices
from converters.coreml.read.program import Operation
from edkm_export.errors import PackageError, PaletteError
from edkm_export.palette import PalettizedTensor

__all__ = ["Weights", "parameter_names"]

_LOOKUP, _SCALE = "constexpr_lut_to_dense", "constexpr_blockwise_shift_scale"
_MIN_NUMEL = (
    10  # below this, coremltools writes constants into the program itself; they are axes, scales, shapes
)


def parameter_names(metadata: Mapping[str, str], where: str) -> dict[str, str]:
    """Parameter names by op output, from the user-defined metadata; empty when there are none.

    Raises:
        PackageError: the entry is not a JSON object of strings.
    """
    if PARAMETERS_KEY not in metadata:
        return {}
    try:
        names = json.loads(metadata[PARAMETERS_KEY])
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{where}: metadata {PARAMETERS_KEY} is not JSON: {error}.") from error
    if not isinstance(names, dict):
        raise PackageError(
            f"{where}: metadata {PARAMETERS_KEY} is {type(names).__name__}, expected an object."
        )
    for output, name in names.items():
        if not isinstance(name, str):
            raise PackageError(
                f"{where}: metadata {PARAMETERS_KEY}: {output!r} maps to {name!r}, expected a string."
            )
    return names


class Weights:
    """The weights of one function.

    Args:
        constants: of the function.
        names: parameter names by op output.
    """

    def __init__(self, constants: Constants, names: Mapping[str, str]) -> None:
        self._constants = constants
        self._names = names
        self._users: dict[str, list[Operation]] = {name: [] for name in constants.operations}
        for operation in constants.function.all_operations:
            for bindings in operation.arguments.values():
                for binding in bindings:
                    if isinstance(binding, str) and binding in self._users:
                        self._users[binding].append(operation)

    def palettized(self) -> dict[str, PalettizedTensor]:
        """Every palettized weight, from the bytes on disk.

        Raises:
            PackageError: a palette is damaged, or of a form that a PalettizedTensor cannot hold.
        """
        found, others = self.palettes()
        if others:
            raise next(iter(others.values()))
        return found

    def palettes(self) -> tuple[dict[str, PalettizedTensor], dict[str, PackageError]]:
        """Palettized weights, and those of a sound form that a PalettizedTensor cannot hold, with what it lacks.

        Raises:
            PackageError: a palette is damaged.
        """
        found: dict[str, PalettizedTensor] = {}
        others: dict[str, PackageError] = {}
        for output, operation in self._constants.operations.items():
            if operation.type != _LOOKUP:
                continue
            for scaling in self._scalings(output):
                final = output if scaling is None else scaling.outputs[0].name
                key = self._names.get(final, self._names.get(output, final))
                try:
                    tensor = self._palette(operation, scaling, key)
                except PackageError as error:
                    if not self._decodes(final):
                        raise
                    others[key] = error
                    continue
                if key in found and not found[key].same_bits(tensor):
                    raise PackageError(
                        f"{self._constants.where(operation)}: another weight {key!r} has other values."
                    )
                found[key] = tensor
        return found, others

    def _decodes(self, name: str) -> bool:
        """Tell whether a constant is sound."""
        try:
            self._constants.stored(name)
        except PackageError:
            return False
        return True

    def dense(self) -> dict[str, Tensor]:
        """Parameters, and constants of at least 10 elements, that are not palettized, as stored or decoded.

        Raises:
            PackageError: one is damaged.
        """
        found: dict[str, Tensor] = {}
        for output in self._constants.operations:
            users = self._users[output]
            if users and all(user.type.startswith("constexpr_") for user in users):
                continue
            small = (self._constants.declared(output).numel or 0) < _MIN_NUMEL
            if output in self._palettes or (small and output not in self._names):
                continue
            value = self._constants.stored(output)
            if isinstance(value, Tensor):
                found[self._names.get(output, output)] = value
        return found

    def _scalings(self, output: str) -> list[Operation | None]:
        """Find the ops that scale what a lookup decodes; None for a use without scale."""
        scalings = [
            user
            for user in self._users[output]
            if user.type == _SCALE and user.arguments["data"] == (output,)
        ]
        return [*scalings] if len(scalings) == len(self._users[output]) and scalings else [None, *scalings]

    @cached_property
    def _palettes(self) -> set[str]:
        """Names of the constants that are looked up, or made of one that is."""
        found: set[str] = set()
        for operation in sorted({*self._constants.operations.values()}, key=lambda each: each.line):
            sources = (name for bindings in operation.arguments.values() for name in bindings)
            if operation.type == _LOOKUP or any(name in found for name in sources if isinstance(name, str)):
                found |= {output.name for output in operation.outputs}
        return found

    def _operand(self, operation: Operation, key: str) -> Tensor | None:
        """Read an argument of a constexpr as stored, None when it is absent."""
        if key not in operation.arguments:
            return None
        (binding,) = operation.arguments[key]
        value = self._constants.operand(operation, binding)
        if not isinstance(value, Tensor):
            raise PackageError(f"{self._constants.where(operation)}: argument {key!r} is not a tensor.")
        return value

    def _palette(self, operation: Operation, scaling: Operation | None, key: str) -> PalettizedTensor:
        where = f"{self._constants.where(operation)}: {key}"
        indices, shape = self._operand(operation, "indices"), self._operand(operation, "shape")
        lut, scale = self._lut_and_scale(operation, scaling, where)
        vector_axis = self._operand(operation, "vector_axis")
        try:
            if indices is None:
                raise PaletteError("has no indices.")
            if shape is not None:
                if scaling is not None:
                    raise PaletteError("a palette of iOS 16 form is scaled.")
                indices = unpack_indices(indices, lut.numel(), [int(size) for size in shape.tolist()])
                lut = lut.reshape(*[1] * indices.dim(), -1, 1)
            if lut.dim() != indices.dim() + 2 or indices.dim() < 2:
                raise PaletteError(f"LUT {list(lut.shape)} for indices {list(indices.shape)}.")
            if lut.shape[-1] > 1 and (vector_axis is None or int(vector_axis) % indices.dim() != 0):
                axis = "none" if vector_axis is None else int(vector_axis)
                raise PaletteError(f"vectors run along axis {axis}, only the output axis (0) can be held.")
            if any(size != 1 for size in lut.shape[2:-2]):
                raise PaletteError(f"LUT {list(lut.shape)} is grouped along a kernel axis.")
            lut = lut.reshape(*lut.shape[:2], *lut.shape[-2:])
            return PalettizedTensor.from_indices(
                key, _as_float16(lut), indices, lut_scale=None if scale is None else _spread(scale, lut)
            )
        except (PaletteError, ValueError, RuntimeError) as error:
            raise PackageError(f"{where}: {error}") from error

    def _lut_and_scale(
        self, operation: Operation, scaling: Operation | None, where: str
    ) -> tuple[Tensor, Tensor | None]:
        """Read the LUT and, for an int8 LUT, its scale [g0, g1, ...], on either side of the lookup."""
        binding = operation.arguments.get("lut", (None,))[0]
        source = self._constants.operations.get(binding) if isinstance(binding, str) else None
        if source is not None and source.type == _SCALE:
            if scaling is not None:
                raise PackageError(f"{where}: its LUT is scaled before and after the lookup.")
            scaling = source
            lut = self._operand(source, "data")
        else:
            lut = self._operand(operation, "lut")
        if lut is None:
            raise PackageError(f"{where}: has no LUT.")
        if scaling is None:
            return lut, None
        if lut.dtype != torch.int8:
            raise PackageError(
                f"{where}: a {lut.dtype} LUT is scaled; only an int8 LUT can be held with a scale."
            )
        offset, scale = self._operand(scaling, "offset"), self._operand(scaling, "scale")
        if offset is not None and bool((offset != 0).any()):
            raise PackageError(f"{where}: its scale has an offset, which cannot be held.")
        if scale is None:
            raise PackageError(f"{where}: its scale is missing.")
        return lut, _as_float16(scale)


def _as_float16(values: Tensor) -> Tensor:
    """float32 values that float16 holds exactly, as float16; others as they are."""
    if values.dtype == torch.float32:
        narrow = values.half()
        if not torch.equal(narrow.float(), values):
            raise PaletteError("float32 values that float16 cannot hold.")
        return narrow
    return values


def _spread(scale: Tensor, lut: Tensor) -> Tensor:
    """Bring a scale [s0, s1, 1, ...] to [G_out, G_in]; s divides the groups of the LUT."""
    if any(size != 1 for size in scale.shape[2:]):
        raise PaletteError(f"scale {list(scale.shape)} varies along an axis without LUTs.")
    groups_out, groups_in = lut.shape[:2]
    scale = scale.reshape(scale.shape[:2])
    if groups_out % scale.shape[0] or groups_in % scale.shape[1]:
        raise PaletteError(f"scale {list(scale.shape)} is finer than the LUTs [{groups_out}, {groups_in}].")
    rows = scale.repeat_interleave(groups_out // scale.shape[0], 0)
    return rows.repeat_interleave(groups_in // scale.shape[1], 1)

"""Constants of a function: decoded when they are used, and kept as far as there is room."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import Tensor

from converters.coreml.read.decoded_weights import DecodedWeights
from converters.coreml.read.layout import PackageLayout
from converters.coreml.read.ops import Call, definition_of, located
from converters.coreml.read.precision import Precision
from converters.coreml.read.program import Function, Operation
from converters.coreml.read.values import Inline, TensorType, Value, decode_bytes
from edkm_export.errors import PackageError

__all__ = ["Constants"]

_MOST_STEPS = 1000  # of one constant; compressed weights have three or four


class Constants:
    """The const and constexpr ops of one function.

    Args:
        layout: the package.
        function: the function.
        shared: decoded tensors of all functions; those that name the same blobs share them.
        numbers: of equal values, by what they depend on; likewise of all functions. None: there is one function.
    """

    def __init__(
        self,
        layout: PackageLayout,
        function: Function,
        shared: DecodedWeights,
        numbers: dict[Hashable, int] | None = None,
    ) -> None:
        self._numbers: dict[Hashable, int] = {} if numbers is None else numbers
        self._layout = layout
        self.function = function
        self._shared = shared
        self._held: dict[tuple[str, bool], Inline] = {}
        self._keys: dict[str, int] = {}
        self._places: dict[str, Hashable] = {}
        self.operations = {
            output.name: op for op in function.all_operations if op.is_constant for output in op.outputs
        }

    def __contains__(self, name: str) -> bool:
        return name in self.operations

    def where(self, operation: Operation) -> str:
        """Package, function and op, for messages."""
        return f"{self._layout.root}: function {self.function.name}: {operation.label}"

    def get(self, name: str, precision: Precision) -> Inline:
        """Get a constant as the interpreter holds it; not to be written to.

        Raises:
            PackageError: its data is damaged.
            UnsupportedOpError: a constexpr that is not implemented.
        """
        native = precision is Precision.FLOAT16
        if (name, native) in self._held:
            return self._held[name, native]
        value = self._compute(name, precision)
        if not self.is_transient(name):
            self._held[name, native] = value
        return value

    def is_transient(self, name: str) -> bool:
        """Whether a constant may have to be decoded at each use, so that nobody may hold it."""
        if not self._shared.limited:
            return False
        return 4 * (self.declared(name).numel or 0) > self._shared.SMALL_BYTES

    def literal(self, value: Value, operation: Operation, precision: Precision) -> Inline:
        """Get a constant that is written at its use, as the interpreter holds it."""
        stored = self.read(value, operation)
        return stored.to(precision.carrier(value.type.dtype)) if isinstance(stored, Tensor) else stored

    def _compute(self, name: str, precision: Precision) -> Inline:
        declared = self.declared(name)
        value = self.operations[name].arguments.get("val", (None,))[0]
        if isinstance(value, Value) and value.blob is None and not isinstance(value.inline, Tensor):
            return self.stored(name)  # words, or a list
        if name not in self._places:
            self._places[name] = (self._layout.root, declared.dtype.name, self._key(name))

        def decode() -> Tensor:
            stored = self.stored(name)
            assert isinstance(stored, Tensor)
            return stored.to(precision.carrier(declared.dtype))

        return self._shared.get(self._places[name], precision is Precision.FLOAT16, decode)

    def declared(self, name: str) -> TensorType:
        """Look up the declared type of a constant."""
        return self.operations[name].outputs[self._place(name)].type

    def stored(self, name: str) -> Inline:
        """Read a constant as it is stored, a constexpr decoded; anew each time.

        Raises:
            PackageError: its data is damaged, or does not have the declared type.
            UnsupportedOpError: a constexpr that is not implemented.
        """
        made: dict[str, Inline] = {}
        for each in self._needed(name):  # none twice, however often it is used
            made[each] = self._evaluated(each, made)
        return made[name]

    def _needed(self, name: str) -> list[str]:
        """The constant, behind those that it is made of.

        Raises:
            PackageError: one is not there, does not come before its use, or they are absurdly many.
        """
        found, waiting = {name}, [name]
        while waiting:
            operation = self.operations[waiting.pop()]
            for bindings in operation.arguments.values():
                for binding in bindings:
                    if not isinstance(binding, str):
                        continue
                    source = self.operations.get(binding)
                    if source is None or source.line >= operation.line:
                        raise PackageError(
                            f"{self.where(operation)}: its operand {binding!r} is not a constant made before it."
                        )
                    if binding not in found:
                        found.add(binding)
                        waiting.append(binding)
            if len(found) > _MOST_STEPS:
                raise PackageError(
                    f"{self.where(self.operations[name])}: is made of more than {_MOST_STEPS} other constants."
                )
        return sorted(found, key=lambda each: self.operations[each].line)

    def _evaluated(self, name: str, made: Mapping[str, Inline]) -> Inline:
        """A constant, from those that it is made of."""
        operation = self.operations[name]
        declared = self.declared(name)
        if operation.type == "const":
            value = operation.arguments.get("val", (None,))[0]
            if not isinstance(value, Value):
                raise PackageError(f"{self.where(operation)}: holds no value.")
            if value.type != declared:
                raise PackageError(
                    f"{self.where(operation)}: declared as {declared}, but holds {value.type}."
                )
            return self.read(value, operation)
        arguments = {
            key: [
                made[binding] if isinstance(binding, str) else self.read(binding, operation)
                for binding in bindings
            ]
            for key, bindings in operation.arguments.items()
        }
        with located(self.where(operation)):
            call = Call(operation, self.function.opset, Precision.FLOAT16)
            results = definition_of(operation).evaluate(call, arguments)
            if len(results) != len(operation.outputs):
                raise PackageError(
                    f"{len(operation.outputs)} outputs are declared, the op makes {len(results)}."
                )
            result = results[self._place(name)]
            if tuple(result.shape) != declared.shape or result.dtype != declared.dtype.stored:
                raise PackageError(
                    f"declared as {declared}, but decodes to {result.dtype} {list(result.shape)}."
                )
            assert isinstance(result, Tensor)
        return result

    def _place(self, name: str) -> int:
        """Which of the outputs of its op a constant is."""
        return [output.name for output in self.operations[name].outputs].index(name)

    def operand(self, operation: Operation, binding: str | Value) -> Inline:
        """Read what an argument of a constexpr is bound to, as stored.

        Raises:
            PackageError: it is not a constant that comes before the op.
        """
        if isinstance(binding, Value):
            return self.read(binding, operation)
        source = self.operations.get(binding)
        if source is None or source.line >= operation.line:
            raise PackageError(
                f"{self.where(operation)}: its operand {binding!r} is not a constant made before it."
            )
        return self.stored(binding)

    def read(self, value: Value, operation: Operation) -> Inline:
        """Decode a constant.

        Raises:
            PackageError: its data is damaged.
        """
        if value.blob is None:
            assert value.inline is not None
            return value.inline
        owner = f"{self.function.name}: {operation.label}"
        shape, dtype = value.type.fixed_shape, value.type.dtype
        count = value.type.numel
        assert shape is not None and count is not None and dtype.blob_code is not None  # see read_value
        blob = self._layout.blob(value.blob.file_name, owner)
        data = blob.read(value.blob.offset, owner, dtype_code=dtype.blob_code, bits=dtype.bits, count=count)
        return decode_bytes(data, dtype, shape, f"{blob.path}: {owner}")

    def _key(self, name: str) -> int:
        """Identify a value by what it depends on, in all functions of a package: equal numbers, equal values."""
        if name not in self._keys:
            for each in self._needed(name):
                operation = self.operations[each]
                parts = [
                    (key, tuple(map(self._binding_key, bindings)))
                    for key, bindings in sorted(operation.arguments.items())
                ]
                words = (operation.type, self._place(each), tuple(parts), str(self.declared(each)))
                # a number, since a tuple of tuples is hashed anew whenever it is used
                self._keys[each] = self._numbers.setdefault(words, len(self._numbers))
        return self._keys[name]

    def _binding_key(self, binding: str | Value) -> Hashable:
        if isinstance(binding, str):
            return self._keys[binding]
        if binding.blob is not None:
            return (str(binding.type), binding.blob)
        inline = binding.inline
        return (
            str(binding.type),
            tuple(inline.reshape(-1).tolist()) if isinstance(inline, Tensor) else inline,
        )

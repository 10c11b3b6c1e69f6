"""Reading and running an .mlpackage without Core ML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from converters.coreml.read.arguments import check_inputs, check_states, make_states
from converters.coreml.read.constants import Constants
from converters.coreml.read.decoded_weights import DecodedWeights
from converters.coreml.read.folder import find_package
from converters.coreml.read.interpreter import Interpreter, Observer
from converters.coreml.read.layout import PackageLayout
from converters.coreml.read.precision import Precision
from converters.coreml.read.program import Function, read_program
from converters.coreml.read.values import BlobReference, Value
from converters.coreml.read.weights import Weights, parameter_names
from edkm_export.errors import InputError
from edkm_export.palette import PalettizedTensor
from edkm_export.quantities import short_size

__all__ = ["Package", "load_package"]


class Package:
    """An .mlpackage on disk. Weights are read when they are needed.

    Attributes:
        path: the folder, resolved.
        functions: by name.
        default_function: name of the function that runs unless another is asked for.
        metadata: the user-defined metadata.
    """

    def __init__(self, layout: PackageLayout, decoded: DecodedWeights | None = None) -> None:
        program = read_program(layout.model_file, layout.size_bytes)
        self.path: Path = layout.root
        self.functions: Mapping[str, Function] = program.functions
        self.default_function: str = program.default_function
        self.metadata: Mapping[str, str] = program.metadata
        self._layout = layout
        self._decoded = DecodedWeights() if decoded is None else decoded
        self._numbers: dict[Hashable, int] = {}
        self._constants: dict[str, Constants] = {}
        self._interpreters: dict[str, Interpreter] = {}

    def __repr__(self) -> str:
        """One line: name, functions with their inputs and outputs, size."""
        functions = ", ".join(
            f"{name}({', '.join(function.inputs)}) -> {', '.join(function.outputs)}"
            for name, function in self.functions.items()
        )
        return f"Package({self.path.name}, {functions}, {short_size(self.size_bytes)})"

    @property
    def size_bytes(self) -> int:
        """Size of all files of the package."""
        return self._layout.size_bytes

    @property
    def weights_size_bytes(self) -> int:
        """Size of the blob files that the program refers to.

        Raises:
            PackageError: one is missing.
        """
        owners = {
            reference.file_name: function.name
            for function in self.functions.values()
            for reference in _blobs(function)
        }
        return sum(self._layout.blob(name, f"function {owner}").size_bytes for name, owner in owners.items())

    def palettized(self, function: str | None = None) -> dict[str, PalettizedTensor]:
        """Read the palettized weights of a function from the bytes on disk.

        Args:
            function: its name; the default function when None.

        Returns:
            By parameter name where the metadata `com.github.edkm-export.parameters` gives one, else by the
            name of the output of the op that decodes the weight.

        Raises:
            PackageError: a palette is damaged, or of a form that a PalettizedTensor cannot hold.
        """
        return self._weights(function).palettized()

    def palettes(self, function: str | None = None) -> tuple[dict[str, PalettizedTensor], dict[str, str]]:
        """Read what `palettized` does, and tell which sound palettes a PalettizedTensor cannot hold, and why.

        Args:
            function: its name; the default function when None.

        Returns:
            Palettized weights by name, and the reasons by name.

        Raises:
            PackageError: a palette is damaged.
        """
        found, others = self._weights(function).palettes()
        return found, {name: str(error) for name, error in others.items()}

    def dense(self, function: str | None = None) -> dict[str, Tensor]:
        """Read the constants of a function that are not palettized and have at least 10 elements, as stored.

        Args:
            function: its name; the default function when None.

        Returns:
            By name, as in `palettized`.

        Raises:
            PackageError: one is damaged.
        """
        return self._weights(function).dense()

    def op_counts(self, function: str | None = None) -> dict[str, int]:
        """How many ops of each type a function has, constants included; sorted by type."""
        return dict(sorted(Counter(op.type for op in self._function(function).all_operations).items()))

    def draws_random_numbers(self, function: str | None = None) -> bool:
        """Tell whether a function draws random numbers, which the interpreter does in its own way."""
        return any(op.type.startswith("random_") for op in self._function(function).all_operations)

    def new_state(self, function: str | None = None) -> dict[str, Tensor]:
        """Zeros for each state of a function, to be passed to `run`; floating point is held in float32.

        Functions that declare the same states can share the result, as prefill and decode do.
        """
        return make_states(self._function(function), str(self.path))

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        function: str | None = None,
        state: dict[str, Tensor] | None = None,
        precision: str = "float32",
        observer: Observer | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Run a function in torch.

        Args:
            inputs: tensors, numpy arrays or lists by name; integers are narrowed to the declared type, floating
                point is converted.
            function: its name; the default function when None.
            state: of `new_state`; changed by the run. Needed when the function has states.
            precision: "float32", "rounded" (float32 arithmetic, rounded to float16 after each op that is
                declared float16) or "float16" (native).
            observer: called as `observer(op, {output: tensor})` after each op but const, for fault
                localization. It must copy what it keeps: states are updated in place.
            seed: of the ops that draw random numbers and have no seed of their own.

        Returns:
            The outputs by name, as tensors; those declared float16 are float32 unless the precision is "float16".
            A classifier also returns a label, string or integer, and the probabilities by label.

        Raises:
            InputError: an input or state is missing, unknown or of the wrong shape.
            UnsupportedOpError: the program holds an op, or a form of one, that is not known.
            PackageError: the package is damaged or contradicts itself.
        """
        chosen, mode = self._function(function), Precision.of(precision)
        arguments = check_inputs(chosen, inputs, mode)
        states = check_states(chosen, state)
        if chosen.name not in self._interpreters:
            constants = self._constants_of(chosen)
            self._interpreters[chosen.name] = Interpreter(chosen, constants, str(self.path))
        return self._interpreters[chosen.name].run(arguments, states, mode, observer, seed)

    def _function(self, name: str | None) -> Function:
        chosen = self.default_function if name is None else name
        if chosen not in self.functions:
            raise InputError(f"{self.path}: no function {chosen!r}; it has {', '.join(self.functions)}.")
        return self.functions[chosen]

    def _constants_of(self, function: Function) -> Constants:
        if function.name not in self._constants:
            self._constants[function.name] = Constants(self._layout, function, self._decoded, self._numbers)
        return self._constants[function.name]

    def _weights(self, function: str | None) -> Weights:
        names = parameter_names(self.metadata, str(self.path))
        return Weights(self._constants_of(self._function(function)), names)


def load_package(path: str | Path, decoded: DecodedWeights | None = None) -> Package:
    """Read an .mlpackage that holds an ML program.

    Args:
        path: of the package, or of the folder that `edkm-export coreml` made; of several chunks the first is read.
        decoded: keeps its decoded weights, and those of other packages; None: all of its own are kept.

    Raises:
        PackageError: it is damaged, hostile or holds something else.
        BackendMissingError: coremltools is not installed.
    """
    return Package(PackageLayout.open(find_package(path)), decoded)


def _blobs(function: Function) -> list[BlobReference]:
    return [
        binding.blob
        for operation in function.all_operations
        for bindings in operation.arguments.values()
        for binding in bindings
        if isinstance(binding, Value) and binding.blob is not None
    ]

"""Core ML packages as the verifier sees them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from converters.coreml.format import TEXT
from converters.coreml.read.description import Description
from converters.coreml.read.joined_vocabulary import joined_dense, joined_palettes, read_splits
from converters.coreml.read.observe import trace_packages
from converters.coreml.read.package import Package
from converters.coreml.read.runtime import predicting
from converters.coreml.read.session import CoreMLSession, open_chunks
from edkm_export.artifact.execution import Execute, Execution
from edkm_export.artifact.protocol import Artifact, DamagedArtifact
from edkm_export.artifact.thresholds import EXECUTION
from edkm_export.errors import PackageError
from edkm_export.palette import PalettizedTensor
from edkm_export.quantities import short_size

__all__ = ["KIND", "CoreMLArtifact", "open_artifact"]

KIND = "Core ML package"


class CoreMLArtifact:
    """A model in one package, or in several that run one after the other.

    Args:
        packages: in the order in which they run.
        description: how they are called.

    Raises:
        PackageError: a package is not what the description says, or a file of weights is missing.
    """

    kind = KIND

    def __init__(self, packages: Sequence[Package], description: Description) -> None:
        self._packages, self.description = packages, description
        self.path: Path = packages[0].path
        self.context = self.claimed_context = description.context
        _ = self.weights_size_bytes()  # opens every file of weights
        CoreMLSession(packages, description)  # has the inputs and outputs that it should
        drawn = ""
        if any(package.draws_random_numbers(where) for package, where in self._functions()):
            drawn = ", random numbers drawn with seed 0"
        self.executions = (
            *(
                Execution(
                    f"execution-{precision}",
                    f"our interpreter of Core ML programs, {threshold.words}{drawn}",
                    threshold,
                    self._interpreted(precision),
                )
                for precision, threshold in EXECUTION.items()
            ),
            self._apple_runtime(),
        )

    def __repr__(self) -> str:
        """One line: package, interface, size."""
        return (
            f"CoreMLArtifact({self.path.name}, {self.description.interface}, {short_size(self.size_bytes())})"
        )

    def reach(self, context: int) -> None:
        """Look for a cache of so many positions, or for a text of them where there are no caches.

        Raises:
            PackageError: there is none.
        """
        shapes = []
        for package, where in self._functions():
            function = package.functions[where]
            held = function.states or {TEXT: function.inputs[TEXT]}
            shapes += [given.type.shape for given in held.values()]
        if not any(context in shape for shape in shapes):
            raise PackageError(f"{self.path}: its caches hold {list(shapes[0])}, which are not so many.")

    def palettized(self) -> dict[str, PalettizedTensor]:
        """Palettized weights by parameter name, read from disk."""
        found: dict[str, PalettizedTensor] = {}
        for package, where in self._functions():
            splits = read_splits(package.metadata, str(package.path))
            joined = joined_palettes(package.palettized(where), splits, str(package.path))
            for name, tensor in joined.items():
                # A tied embedding is in the first and in the last package, every weight in both functions.
                if name in found and not found[name].same_bits(tensor):
                    raise PackageError(
                        f"{package.path}: function {where}: {name} differs from another copy of it."
                    )
                found[name] = tensor
        return found

    def dense(self) -> dict[str, Tensor]:
        """Other constants by parameter name, read from disk."""
        found: dict[str, Tensor] = {}
        for package, where in self._functions():
            splits = read_splits(package.metadata, str(package.path))
            found |= joined_dense(package.dense(where), splits, str(package.path))
        return found

    def weights_size_bytes(self) -> int:
        """Size of the blob files."""
        return sum(package.weights_size_bytes for package in self._packages)

    def size_bytes(self) -> int:
        """Size of the packages."""
        return sum(package.size_bytes for package in self._packages)

    def session(self) -> CoreMLSession | None:
        """The packages with their cache; None when they have none."""
        if self.description.interface == "logits":
            return None
        return CoreMLSession(self._packages, self.description)

    def rounded_session(self) -> CoreMLSession | None:
        """The same, rounded to float16 after each op."""
        if self.description.interface == "logits":
            return None
        return CoreMLSession(self._packages, self.description, "rounded")

    def trace(
        self, execution: str, tokens: Tensor, observe: Callable[[str, Tensor], None], cached: int = 0
    ) -> None:
        """Run a text in the interpreter and show what each operation makes."""
        precision = execution.removeprefix("execution-")
        trace_packages(self._packages, self.description, precision, tokens, observe, cached)

    def _functions(self) -> list[tuple[Package, str]]:
        return [(package, function) for package in self._packages for function in package.functions]

    def _interpreted(self, precision: str) -> Execute:
        session: list[CoreMLSession] = []  # made when it is first run, and kept: it holds the states

        def execute(tokens: Tensor) -> Tensor:
            if not session:
                session.append(CoreMLSession(self._packages, self.description, precision))
            session[0].reset()
            return session[0].feed(tokens.long())

        return execute

    def _apple_runtime(self) -> Execution:
        """The packages in Apple's own runtime; macOS only."""
        threshold, execute = EXECUTION["rounded"], None
        missing = f"needs macOS, this is {platform.system()}"
        if platform.system() == "Darwin":
            execute, missing = predicting([package.path for package in self._packages], self.description), ""
        why = "only Apple's own runtime shows what its compiler and compute units do"
        return Execution(
            "execution-apple", "Apple's Core ML runtime (macOS)", threshold.because(why), execute, missing
        )


def open_artifact(path: str | Path) -> Artifact:
    """Open a model for the verifier; one that cannot be opened becomes a DamagedArtifact.

    Args:
        path: of a package, of one of its chunks, or of the folder that `edkm-export coreml` made.
    """
    try:
        return CoreMLArtifact(*open_chunks(path))
    except PackageError as error:
        return DamagedArtifact(Path(path), KIND, str(error))

"""Core ML packages as the verifier sees them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from converters.coreml.format import TEXT
from converters.coreml.read.description import Description
from converters.coreml.read.embedding_artifact import CoreMLEmbeddingArtifact
from converters.coreml.read.observe import trace_packages
from converters.coreml.read.package import Package
from converters.coreml.read.package_files import KIND, PackageFiles
from converters.coreml.read.runtime import predicting
from converters.coreml.read.session import CoreMLSession, open_chunks
from edkm_export.artifact.encodings import EmbeddingArtifact
from edkm_export.artifact.execution import Execute, Execution
from edkm_export.artifact.protocol import Artifact, DamagedArtifact
from edkm_export.artifact.thresholds import EXECUTION
from edkm_export.errors import PackageError
from edkm_export.quantities import short_size

__all__ = ["KIND", "CoreMLArtifact", "open_artifact"]


class CoreMLArtifact(PackageFiles):
    """A model in one package, or in several that run one after the other.

    Args:
        packages: in the order in which they run.
        description: how they are called.

    Raises:
        PackageError: a package is not what the description says, or a file of weights is missing.
    """

    def __init__(self, packages: Sequence[Package], description: Description) -> None:
        super().__init__(packages, description)
        self.claimed_context = description.context
        CoreMLSession(packages, description)  # has the inputs and outputs that it should
        drawn = self.drawn_words()
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
        for package, where in self.functions():
            function = package.functions[where]
            if not function.states and TEXT not in function.inputs:
                raise PackageError(
                    f"{self.path}: function '{where}' has neither caches nor an input '{TEXT}'."
                )
            held = function.states or {TEXT: function.inputs[TEXT]}
            shapes += [given.type.shape for given in held.values()]
        if not any(context in (shape or ()) for shape in shapes):
            raise PackageError(
                f"{self.path}: its caches hold {list(shapes[0] or ())}, which are not so many."
            )

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


def open_artifact(path: str | Path, room_bytes: int | None = None) -> Artifact | EmbeddingArtifact:
    """Open a model for the verifier; one that cannot be opened becomes a DamagedArtifact.

    Args:
        path: of a package, of one of its chunks, or of the folder that `edkm-export coreml` made.
        room_bytes: what decoded weights may take in memory; None: no limit.
    """
    try:
        packages, description = open_chunks(path, room_bytes)
        kind = CoreMLEmbeddingArtifact if description.interface == "embedding" else CoreMLArtifact
        return kind(packages, description)
    except PackageError as error:
        return DamagedArtifact(Path(path), KIND, str(error))

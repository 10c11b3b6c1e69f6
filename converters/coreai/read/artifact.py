"""An exported Core AI model as the verifier sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from converters.coreai.backend import missing_backend
from converters.coreai.read.asset import Asset, load_asset
from converters.coreai.read.running import RunningModel
from converters.coreai.read.runtime import RUNTIME_NAME
from converters.coreai.read.session import new_session
from edkm_export.artifact.execution import Execute, ExecuteHeld, Execution
from edkm_export.artifact.protocol import Artifact, DamagedArtifact, Session
from edkm_export.artifact.thresholds import FLOAT16_TWIN, float16_chains
from edkm_export.errors import PackageError
from edkm_export.kv_cache import INT8, HeldCache, KVCache
from edkm_export.palette import PalettizedTensor

__all__ = ["KIND", "CoreAIArtifact", "open_artifact"]

KIND = "Core AI model"

_WINDOW = 512  # positions of one execution
_FEW = 4  # positions of the file itself: it takes seconds for each


class CoreAIArtifact:
    """A model in an .aimodel.

    Args:
        asset: as read.

    Raises:
        PackageError: it has another interface than it says, or was not exported by us.
    """

    kind = KIND

    def __init__(self, asset: Asset) -> None:
        self.asset, self._model = asset, RunningModel(asset)
        self.path: Path = asset.path
        self.description = asset.description
        self.context = min(_WINDOW, self.description.context)
        self.claimed_context = self.description.context
        self.kv_cache: KVCache = self.description.kv_cache
        self._sessions: dict[bool, Session] = {}
        missing = missing_backend()
        self.executions = (
            Execution(
                "execution-coreai-twin",
                f"{RUNTIME_NAME}, weights decoded once, products in float32",
                FLOAT16_TWIN,
                None if missing else self._execute(exact=False),
                missing,
                held=self._holding(exact=False),
            ),
            Execution(
                "execution-coreai",
                f"{RUNTIME_NAME}, the file itself",
                float16_chains(self._products()),
                None if missing else self._execute(exact=True),
                missing,
                positions=_FEW,
                apart=True,
                held=self._holding(exact=True),
            ),
        )

    def palettized(self) -> dict[str, PalettizedTensor]:
        """Palettized weights by parameter name, read from disk by our reader."""
        return self.asset.palettized()

    def dense(self) -> dict[str, Tensor]:
        """Other parameters by name, read from disk by our reader."""
        return self.asset.dense()

    def weights_size_bytes(self) -> int:
        """Size of all constants of the program."""
        return self.asset.constants_size_bytes

    def size_bytes(self) -> int:
        """Size of the .aimodel."""
        return self.asset.size_bytes

    @property
    def pads_3bit(self) -> bool:
        """True when indices of 3 bits are held in 4.

        Raises:
            PackageError: a palette has a form that is not understood.
        """
        told = self.description.palettized.values()
        three = {entry.digest for entry in told if entry.n_bits == 3}
        return any(palette.n_bits == 4 for palette in self.asset.palettes() if palette.digest in three)

    def session(self) -> Session | None:
        """The twin with its cache; None without Apple's runtime."""
        return None if missing_backend() else new_session(self._model)

    def rounded_session(self) -> None:
        """None: the twin rounds already."""
        return None

    def trace(
        self, execution: str, tokens: Tensor, observe: Callable[[str, Tensor], None], cached: int = 0
    ) -> None:
        """Run a text in the twin and show the value of each operation; see `artifact.protocol.Traceable`.

        The twin stands for the file itself, too, whose operations would take seconds a token.
        """
        runtime = self._model.observed()
        session = new_session(self._model, runtime=runtime)
        if cached:
            session.feed(tokens[:cached].long())
        runtime.observer = observe
        session.feed(tokens[cached:].long())

    def decoded_elsewhere(self) -> Iterator[tuple[str, Tensor]]:
        """Weights as Apple's runtime decodes them from the palettes on disk; see `artifact.protocol.Decoding`."""
        return self._model.decoded()

    @property
    def decoder_name(self) -> str:
        """Whose decoding that is."""
        return RUNTIME_NAME

    @property
    def decoder_missing(self) -> str:
        """Why it cannot be asked; empty when it can."""
        return missing_backend()

    def _products(self) -> Iterator[int]:
        """Terms of a sum in the product with each weight; a tied embedding is the head, too."""
        told = self.description
        shapes = [entry.shape for entry in told.palettized.values()]
        shapes += [tuple(entry.shape) for entry in told.dense.values() if len(entry.shape) == 2]
        return (shape[1] for shape in shapes)

    def _execute(self, *, exact: bool) -> Execute:
        def execute(tokens: Tensor) -> Tensor:
            session = self._session(exact=exact)
            session.reset()
            return session.feed(tokens.long())

        return execute

    def _holding(self, *, exact: bool) -> ExecuteHeld | None:
        if self.kv_cache != INT8:
            return None
        run = self._execute(exact=exact)

        def execute(tokens: Tensor) -> tuple[Tensor, HeldCache]:
            session: Any = self._session(exact=exact)
            return run(tokens), session.held()

        return execute

    def _session(self, *, exact: bool) -> Session:
        """Made when it is first run, and kept."""
        if exact not in self._sessions:
            self._sessions[exact] = new_session(self._model, exact=exact)
        return self._sessions[exact]


def open_artifact(path: str | Path) -> Artifact:
    """Open an .aimodel, or the folder that holds it, for the verifier; a broken one becomes a DamagedArtifact."""
    try:
        return CoreAIArtifact(load_asset(path))
    except PackageError as error:
        return DamagedArtifact(Path(path), KIND, str(error))

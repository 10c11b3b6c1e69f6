"""The folder of a run: what is in it, and when a run may go on in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from edkm_export.atomic import MARKER, check_output, place_folder
from edkm_export.claims import claimed, clear, refuse_claimed, whole
from edkm_export.errors import InputError
from edkm_export.filesystem import remove
from edkm_export.training import run_checkpoints, run_log
from edkm_export.training.run_record import Identity, RunRecord
from edkm_export.training.tokens import Tokens
from edkm_export.training.train_config import TrainConfig

__all__ = ["RunFolder"]


class RunFolder(contextlib.ExitStack):
    """Paths and metadata of a run; used as a context, which keeps other runs out of the folder.

    A run that ends before its first step leaves nothing: until `keep`, a new run is written beside the folder, and what
    it is to replace stays where it is.

    Attributes:
        path: holds metadata.json, log.jsonl, curve.png, generated.tokens, checkpoints and model.pt.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path.resolve() if path.is_symlink() else path
        self._overwrite = False
        self._new: Path | None = None  # where it is written until `keep`

    @property
    def place(self) -> Path:
        """Where the run is written now."""
        return self._new or self.path

    @property
    def log(self) -> Path:
        """Losses and evaluations, a line each."""
        return self.place / "log.jsonl"

    @property
    def curve(self) -> Path:
        """The picture of the log."""
        return self.place / "curve.png"

    @property
    def model(self) -> Path:
        """The result."""
        return self.place / "model.pt"

    @property
    def generated(self) -> Path:
        """Tokens that the original wrote."""
        return self.place / "generated.tokens"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of transformers' Trainer."""
        return self.place / "checkpoints"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that the run could not have.

        Raises:
            OutputExistsError: it exists, and neither is set, or it is not ours; or another process writes it.
            InputError: it cannot be made.
        """
        refuse_claimed(self.path)
        check_output(self.path, overwrite=overwrite or resume, folder=True, in_place=resume)

    def open(self, *, resume: bool, overwrite: bool, tell: Callable[[str], None]) -> Path | None:
        """Take the folder; the checkpoint to go on from, None to start anew, also when a run left none behind.

        Args:
            resume: go on with the run in the folder.
            overwrite: replace it.
            tell: called with a line for each checkpoint that is passed over.

        Raises:
            OutputExistsError, InputError: see `check`.
        """
        self.check(resume=resume, overwrite=overwrite)
        self._new, self._overwrite = None, overwrite or resume
        beside = self.enter_context(claimed(self.path))
        needed = (
            run_checkpoints.WEIGHTS,
            run_checkpoints.OPTIMIZER,
            run_checkpoints.SCHEDULER,
            run_checkpoints.TRAINER,
        )
        last = run_checkpoints.last_whole(self.checkpoints, needed, tell) if resume else None
        if last is None:
            self._new = beside / whole(self.path).name
            self._new.mkdir()
        return last

    def keep(self) -> None:
        """Keep what the run writes, since it has made a step; what it replaces goes.

        Raises:
            OutputExistsError: something else has taken its place meanwhile.
        """
        if self._new is None:
            return
        place_folder(self._new, self.path, overwrite=self._overwrite)
        for replaced in list(self._new.parent.iterdir()):
            remove(replaced)
        self._new = None

    def record(self, record: RunRecord) -> None:
        """Write what the run is, before its first step."""
        record.write(self.place / MARKER)

    def go_on(self, last: Path, identity: Identity, config: TrainConfig) -> RunRecord:
        """Go on from a checkpoint: nothing is left of what came after it.

        Returns:
            What `record` wrote.

        Raises:
            InputError: the run was started with something else; the message says with what.
        """
        path = self.place / MARKER
        found = RunRecord.read(path)
        found.require(path, identity, config)
        if found.generated_sha256 and Tokens.load(self.generated).sha256() != found.generated_sha256:
            raise InputError(
                f"{self.generated}: is not what the run was started with; start anew with --overwrite."
            )
        clear(path)
        run_checkpoints.drop_others(self.checkpoints, last)
        run_log.cut(self.log, run_checkpoints.step(last))
        return found

"""Apple's Core AI runtime in a process of its own.

A damaged file aborts the runtime, and with it the process that it runs in; it checks neither hash nor inputs. So files
are checked by our reader first, calls before they are made, and a deadline ends what hangs.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.coreai.backend import missing_backend
from converters.coreai.read.element_types import TensorType
from converters.coreai.read.frames import Frame, pack_frame, read_frame
from converters.coreai.read.program import Function
from edkm_export.errors import BackendMissingError, InputError, PackageError
from edkm_export.taking_turns import taking_turns

__all__ = ["DEADLINE_S", "RUNTIME_NAME", "AppleRuntime"]

RUNTIME_NAME = f"Apple's Core AI runtime for {'macOS' if sys.platform == 'darwin' else 'Linux'}, CPU"
DEADLINE_S = 1800.0
"""Longest wait for one call. A few tokens of a model of a billion weights take minutes, see docs/coreai.md."""

_ROOT = Path(__file__).resolve().parents[3]


class AppleRuntime:
    """A child process that holds one asset. It loads the asset while we go on, and is waited for when it is first used.

    Args:
        path: of the .aimodel that is run.
        functions: its functions as our reader sees them, by which calls are checked.
        name: of the model, for messages.
        deadline_s: longest wait for one answer.

    Raises:
        PackageError: the process died at once.
        BackendMissingError: coreai-core is not installed.
    """

    def __init__(
        self, path: Path, functions: Mapping[str, Function], name: str, *, deadline_s: float = DEADLINE_S
    ) -> None:
        self._functions, self._name = functions, name
        self._child = Child(name, deadline_s)
        self._loading: Iterator[Frame] | None = self._child.start({"do": "load", "path": str(path)})

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._child.pid

    def close(self) -> None:
        """End the process."""
        self._child.close()

    def set_state(self, name: str, array: NDArray[Any]) -> None:
        """Give a state its contents.

        Raises:
            PackageError: the runtime refuses the file or dies of it.
        """
        self._ask({"do": "state", "name": name}, {"contents": array})

    def state(self, name: str) -> NDArray[Any]:
        """The contents of a state."""
        return self._ask({"do": "contents", "name": name})[1]["contents"]

    def grow_state(self, name: str, axis: int, length: int) -> None:
        """Make a state longer; what it holds stays, what is new is zero."""
        self._ask({"do": "grow", "name": name, "axis": axis, "length": length})

    def call(
        self,
        function: str,
        inputs: Mapping[str, NDArray[Any]],
        *,
        states: Mapping[str, str] | None = None,
        kept: Mapping[str, str] | None = None,
        keep: Mapping[str, str] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Run a function.

        Args:
            function: its name.
            inputs: arrays by the name of the input.
            states: {state of the function: name of ours}.
            kept: {input: name under which an earlier output was kept}.
            keep: {output: name to keep it by}; it is not returned.

        Returns:
            The other outputs by name.

        Raises:
            InputError: unknown function, or an input that is missing, unknown, or of another type or shape.
            PackageError: the runtime refuses the file, fails, dies, or takes too long.
        """
        self._check(function, inputs, states or {}, kept or {})
        message = {
            "do": "call",
            "function": function,
            "states": dict(states or {}),
            "kept": dict(kept or {}),
            "keep": dict(keep or {}),
        }
        _, outputs = self._ask(message, inputs)
        return outputs

    def _ask(self, message: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None) -> Frame:
        if self._loading is not None:
            for _ in self._loading:  # its only answer
                pass
            self._loading = None
        return self._child.ask(message, arrays)

    def _check(
        self,
        function: str,
        inputs: Mapping[str, NDArray[Any]],
        states: Mapping[str, str],
        kept: Mapping[str, str],
    ) -> None:
        if function not in self._functions:
            there = ", ".join(self._functions)
            raise InputError(f"{self._name}: has no function {function!r}; it has {there}.")
        known = self._functions[function]
        for what, given, wanted in (
            ("input", {*inputs, *kept}, known.inputs.keys()),
            ("state", states.keys(), known.states.keys()),
        ):
            if different := sorted(given ^ set(wanted)):
                word = "unknown" if different[0] in given else "missing"
                raise InputError(f"{self._name}: function {function}: {what} {different[0]!r} is {word}.")
        for name, array in inputs.items():
            if not _fits(known.inputs[name], array):
                raise InputError(
                    f"{self._name}: function {function}: input {name!r} is {array.dtype} {list(array.shape)}, expected "
                    f"{known.inputs[name]}."
                )


def _fits(wanted: TensorType, array: NDArray[Any]) -> bool:
    return (
        str(array.dtype) == wanted.element
        and array.ndim == len(wanted.shape)
        and all(
            size > 0 and told in (None, size) for told, size in zip(wanted.shape, array.shape, strict=True)
        )
    )


class Child:
    """A child process that answers messages, one at a time.

    Args:
        name: of the model, for messages.
        deadline_s: longest wait for one answer.

    Raises:
        BackendMissingError: coreai-core is not installed.
    """

    def __init__(self, name: str, deadline_s: float = DEADLINE_S) -> None:
        if reason := missing_backend():
            raise BackendMissingError(reason)
        self._name, self._deadline_s = name, deadline_s
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        # The runtime makes large copies of models there, and a process that is ended leaves them.
        self._folder = tempfile.TemporaryDirectory(prefix="edkm-export-coreai-")
        paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "converters.coreai.read.runtime_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path for path in paths if path),
                "TMPDIR": self._folder.name,
            },
            start_new_session=True,  # an interrupt reaches it through us
        )
        self._end = weakref.finalize(self, _end, self._process, self._folder)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def close(self) -> None:
        """End the process."""
        self._end()

    @taking_turns
    def ask(self, message: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None) -> Frame:
        """Send a message and wait for the answer.

        Raises:
            PackageError: the child reports an error, dies, or takes too long.
        """
        return next(self.ask_many(message, arrays))

    def ask_many(
        self, message: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None
    ) -> Iterator[Frame]:
        """Send a message and give answers until the child says that it was the last."""
        yield from self.start(message, arrays)

    def start(
        self, message: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None
    ) -> Iterator[Frame]:
        """Send a message; the answers, which are waited for when they are asked for, before anything else is sent."""
        assert self._process.stdin is not None
        try:
            for piece in pack_frame(message, arrays or {}):
                self._process.stdin.write(piece)
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._died() from None
        return self._answers()

    def _answers(self) -> Iterator[Frame]:
        while True:
            try:
                answer, found = read_frame(self._take)
            except (ValueError, KeyError, TypeError) as error:
                self.close()
                raise PackageError(
                    f"{self._name}: {RUNTIME_NAME} answers with nonsense ({error})."
                ) from error
            if "error" in answer:
                raise PackageError(f"{self._name}: {RUNTIME_NAME} fails: {answer['error']}")
            yield answer, found
            if not answer.get("more"):
                return

    def _take(self, size: int) -> bytearray:
        """So many bytes of the answer."""
        assert self._process.stdout is not None
        handle = self._process.stdout.fileno()
        found, place, until = bytearray(size), 0, time.monotonic() + self._deadline_s
        view = memoryview(found)
        while place < size:
            ready, _, _ = select.select([handle], [], [], max(until - time.monotonic(), 0))
            if not ready:
                self.close()
                raise PackageError(
                    f"{self._name}: {RUNTIME_NAME} gave no answer within {self._deadline_s:g} s and was ended."
                )
            count = os.readv(handle, [view[place:]])
            if not count:
                raise self._died()
            place += count
        return found

    def _died(self) -> PackageError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        status = self._process.poll()
        how = f"signal {-status}" if status is not None and status < 0 else f"status {status}"
        self.close()
        return PackageError(
            f"{self._name}: {RUNTIME_NAME} ended with {how}{self._last_words()}; the file is damaged, or the runtime "
            "cannot run it."
        )

    def _last_words(self) -> str:
        self._words.seek(0)
        lines = self._words.read()[-4000:].decode(errors="replace").strip().splitlines()
        told = [line.strip() for line in lines if line.strip()]
        return f" ({told[-1][:200]})" if told else ""


def _end(process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    with contextlib.suppress(OSError):
        process.kill()
    process.wait()
    folder.cleanup()


def zeros(kind: TensorType, lengths: Mapping[int, int]) -> NDArray[Any]:
    """An array of a type, its free axes as long as `lengths` says."""
    shape = [lengths[axis] if size is None else size for axis, size in enumerate(kind.shape)]
    return np.zeros(shape, kind.element)

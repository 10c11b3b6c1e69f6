"""The child process of `runtime.py`: runs what the parent asks for with Apple's runtime.

Started as a module; it imports no torch unless a program is to be rewritten.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from converters.coreai.backend import load_runtime
from converters.coreai.read.frames import pack_frame, read_frame

Arrays = dict[str, NDArray[Any]]


class Worker:
    """Answers one parent.

    Args:
        answers: where answers go.
    """

    def __init__(self, answers: BinaryIO) -> None:
        self._answers = answers
        self._core = load_runtime()
        self._model: Any = None
        self._functions: dict[str, Any] = {}
        self._states: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}
        self._open = contextlib.AsyncExitStack()  # the runtime's own copies of what it has loaded

    def send(self, message: dict[str, Any], arrays: Arrays | None = None) -> None:
        """Write an answer."""
        for piece in pack_frame(message, arrays or {}):
            self._answers.write(piece)
        self._answers.flush()

    async def answer(self, message: dict[str, Any], arrays: Arrays) -> None:
        """Do what a message asks for."""
        what = message["do"]
        if what == "load":
            self._model = await self._load(Path(message["path"]))
            self.send({"functions": self._model.function_names})
        elif what == "state":
            self._states[message["name"]] = self._core.NDArray(arrays["contents"].copy())
            self.send({})
        elif what == "contents":
            self.send({}, {"contents": np.array(self._states[message["name"]].numpy())})
        elif what == "grow":
            self._grow(message["name"], message["axis"], message["length"])
            self.send({})
        elif what == "call":
            self.send({}, await self._call(message, arrays))
        elif what == "twin":
            from converters.coreai.read.rewriting import write_twin

            values = write_twin(Path(message["path"]), Path(message["output"]), observed=message["observed"])
            self.send({"values": values})
        elif what == "decode":
            await self._decode(Path(message["path"]), Path(message["output"]))

    async def _load(self, path: Path) -> Any:
        return await self._open.enter_async_context(self._core.Asset.load(path).executable())

    async def _call(self, message: dict[str, Any], arrays: Arrays) -> Arrays:
        name = message["function"]
        if name not in self._functions:
            self._functions[name] = self._model.load_function(name)
        inputs = {key: self._core.NDArray(array.copy()) for key, array in arrays.items()}
        inputs |= {key: self._kept[kept] for key, kept in message["kept"].items()}
        states = {key: self._states[ours] for key, ours in message["states"].items()}
        results = await self._functions[name](inputs, states)
        for output, kept in message["keep"].items():
            self._kept[kept] = results.pop(output)
        return {key: np.array(value.numpy()) for key, value in results.items()}

    def _grow(self, name: str, axis: int, length: int) -> None:
        before = self._states[name].numpy()
        shape = list(before.shape)
        shape[axis] = length
        after = np.zeros(shape, before.dtype)
        after[tuple(slice(0, size) for size in before.shape)] = before
        self._states[name] = self._core.NDArray(after)

    async def _decode(self, path: Path, output: Path) -> None:
        """Let the runtime decode each palette of an asset; one answer a palette, named by its digest."""
        from converters.coreai.read.rewriting import write_decoders

        digests = write_decoders(path, output)
        model = await self._load(output)
        for place, (function, digest) in enumerate(digests.items()):
            result = await model.load_function(function)({"x": self._core.NDArray(np.zeros(1, np.float16))})
            last = place == len(digests) - 1
            self.send({"digest": digest, "more": not last}, {"weight": np.array(result["y"].numpy())})


def main() -> None:
    """Answer until the parent leaves."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what native code prints must not get between the answers
    questions = sys.stdin.buffer

    def take(size: int) -> bytearray:
        found = bytearray(questions.read(size))
        if len(found) < size:
            os._exit(0)  # the parent has left; the runtime may hang at an orderly end
        return found

    worker = Worker(answers)

    async def serve() -> None:
        while True:
            message, arrays = read_frame(take)
            try:
                await worker.answer(message, arrays)
            except Exception as error:  # whatever it is, the parent is to know
                worker.send({"error": f"{type(error).__name__}: {str(error).strip()[:500]}"})

    asyncio.run(serve())


if __name__ == "__main__":
    main()

"""Tokenizers and chat templates of strangers, in a process that a deadline ends.

Both are programs: a few rules of normalization can make gigabytes of a letter, a regular expression can try for hours,
and two nested loops of a template never end. They are loaded and run in a child process; this one loads them after it
did, for what only describes them. Where a system cannot fork (Windows), there is no deadline.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import select
import signal
import struct
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edkm_export.errors import InputError
from edkm_export.library_logs import silence
from edkm_export.regular_file import require_regular_folder

if TYPE_CHECKING:
    from transformers import BatchEncoding

__all__ = ["GuardedTokenizer", "TokenizerError", "guarded", "open_tokenizer"]

_SECONDS = 10.0  # of the processor; a busy machine takes longer by the clock
_CLOCK = 6.0  # so many times
_CHARACTERS_PER_SECOND = (
    10_000  # beyond these seconds; the slowest of the usual tokenizers take twice as many
)
_MOST_BYTES = 1 << 30  # of memory, beyond a few hundred bytes for each character
_BYTES_PER_CHARACTER = 512
_BYTES_PER_LOADED = 16  # of its files count as a character: a vocabulary takes 30 times as much as its file
_LOADING_SECONDS = 60.0  # at most; 262,144 tokens take ten
_MOST_ANSWER_BYTES = 1 << 28
_LENGTH = struct.Struct("<Q")
_SUFFIXES = (".json", ".model", ".jinja", ".txt", ".tiktoken", ".vocab")
_PROBES = (
    "",
    " ",
    "a",
    "The quick brown fox, 42 times.\n\n\tif (x == y) { return [0.5]; }",
    "äé 漢字 🙂 a a a a aaaa",
)
_NO_LIMIT = -1


class TokenizerError(InputError):
    """A tokenizer or template that cannot be loaded, fails, or was ended since it took too long or too much."""


def open_tokenizer(folder: str | Path, where: str) -> GuardedTokenizer:
    """The tokenizer of a folder, by transformers. Remote code is never run.

    Args:
        folder: with its files.
        where: what it belongs to, for messages.

    Raises:
        TokenizerError: it cannot be loaded within the bounds.
        Exception: what transformers raises for files that it cannot read; such errors have no common base.
    """
    try:
        require_regular_folder(folder, _SUFFIXES)
    except OSError as error:
        raise TokenizerError(f"{where}: {error.filename}: {error.strerror}.") from error

    def load() -> Any:
        import transformers

        silence("transformers")
        return transformers.AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )

    files = [each for each in Path(folder).iterdir() if each.suffix in _SUFFIXES]
    return guarded(load, where, sum(each.stat().st_size for each in files))


def guarded(load: Callable[[], Any], where: str, size_bytes: int) -> GuardedTokenizer:
    """A tokenizer, loaded in the child first.

    Args:
        load: gives a tokenizer of transformers.
        where: what it belongs to, for messages.
        size_bytes: about, of what it is made of.

    Raises:
        TokenizerError: it cannot be loaded within the bounds.
        Exception: what `load` raises.
    """
    child = _Child(load, where)
    fault = child.ask({"do": "load"}, size_bytes // _BYTES_PER_LOADED, _LOADING_SECONDS)
    held = load()  # raises what it raised in the child
    if fault is not None:
        raise TokenizerError(f"{where}: {_FAILURES['load']}: {fault}")
    _check_template(getattr(held, "chat_template", None), where)
    return GuardedTokenizer(held, child)


def _check_template(template: Any, where: str) -> None:
    """A chat template is a text, or texts by name; transformers takes whatever a file says."""
    texts = list(template.values()) if isinstance(template, dict) else [template]
    wrong = next((each for each in texts if not isinstance(each, str)), None)
    if template is not None and (wrong is not None or None in texts):
        raise TokenizerError(
            f"{where}: its chat template is {wrong!r:.40}, expected a text, or texts by name; mend or remove "
            "chat_template in tokenizer_config.json."
        )


class GuardedTokenizer:
    """A tokenizer of transformers that is called in the child process.

    What runs its rules or its template is a method here; all else is the tokenizer's own.

    Args:
        tokenizer: of transformers.
        child: that holds the same one.
    """

    def __init__(self, tokenizer: Any, child: _Child) -> None:
        self._tokenizer, self._child = tokenizer, child

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_tokenizer", "_child"):
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_tokenizer", "_child"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._tokenizer, name, value)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, text: str, **options: Any) -> BatchEncoding:
        """Token ids of a text, `input_ids`, and what else the options ask for.

        Raises:
            TokenizerError: it fails, or takes too long.
        """
        from transformers import BatchEncoding

        tensors = options.pop("return_tensors", None)
        found = self._child.ask({"do": "encode", "text": text, "options": options}, len(text))
        return BatchEncoding(found, tensor_type=tensors, prepend_batch_axis=tensors is not None)

    def decode(self, token_ids: Any, **options: Any) -> str:
        """Text of token ids.

        Raises:
            TokenizerError: it fails, or takes too long.
        """
        listed = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        ids = [int(each) for each in listed] if isinstance(listed, Sequence) else [int(listed)]
        text: str = self._child.ask({"do": "decode", "ids": ids, "options": options}, len(ids))
        return text

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """A conversation as the template writes it; with `tokenize=True`, as transformers does by default, its ids.

        Raises:
            TokenizerError: the template fails, or takes too long.
        """
        turns = [dict(turn) for turn in conversation]
        size = sum(len(str(value)) for turn in turns for value in turn.values())
        return self._child.ask({"do": "template", "turns": turns, "options": options}, size)


class _Child:
    """A fork of this process that answers one question after the other.

    Args:
        load: gives the tokenizer.
        where: what it belongs to, for messages.
    """

    def __init__(self, load: Callable[[], Any], where: str) -> None:
        self._where, self._answer = where, _Tokenizer(load)
        self._pid: int | None = None
        self._owner = os.getpid()
        if hasattr(os, "fork"):
            self._start()

    def _start(self) -> None:
        theirs, self._questions = os.pipe()
        self._answers, to_us = os.pipe()
        with warnings.catch_warnings():
            # Python warns of forks beside threads; the child uses nothing that another thread may hold
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            _serve(self._answer, theirs, to_us, (self._questions, self._answers))
        os.close(theirs)
        os.close(to_us)
        self._pid = pid
        self._end = weakref.finalize(self, _end, pid, self._owner, (self._questions, self._answers))

    def ask(self, question: Mapping[str, Any], size: int = 0, most_seconds: float = math.inf) -> Any:
        """Its answer.

        Args:
            question: for `_Tokenizer`.
            size: characters or tokens that are handed over.
            most_seconds: that it may take, whatever the size.

        Raises:
            TokenizerError: it says so, dies, or takes too long.
        """
        # in a child of this process, such as a worker of a data loader, the pipes are not ours
        if self._pid is None or os.getpid() != self._owner:
            return self._understood(_answered(self._answer, question))
        if not self._end.alive:
            raise TokenizerError(f"{self._where}: its tokenizer was ended before, since it took too much.")
        seconds = min(_SECONDS + size / _CHARACTERS_PER_SECOND, most_seconds)
        until = time.monotonic() + _CLOCK * seconds
        data = json.dumps({**question, "size": size, "seconds": seconds}).encode()
        try:
            _write(self._questions, data)
            (length,) = _LENGTH.unpack(self._read(_LENGTH.size, until))
            if length > _MOST_ANSWER_BYTES + 64 * size:
                raise EOFError
            return self._understood(json.loads(self._read(length, until)))
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            if isinstance(error, TimeoutError) or self._ended_by() == getattr(signal, "SIGXCPU", None):
                self._end()
                raise TokenizerError(
                    f"{self._where}: its tokenizer or chat template took more than {seconds:.0f} s and was stopped: "
                    "its rules are made to take long."
                ) from None
            self._end()
            raise TokenizerError(
                f"{self._where}: its tokenizer or chat template took too much memory, or ended its process."
            ) from None
        except (
            BaseException
        ):  # Ctrl-C: an answer that comes later would be taken for that of another question
            self._end()
            raise

    def _ended_by(self) -> int | None:
        """The signal that ended the child; None: another end, or it goes on."""
        assert self._pid is not None
        with contextlib.suppress(ChildProcessError):
            for _ in range(100):  # its pipes are closed a moment before it has ended
                found = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if found is not None:
                    return found.si_status if found.si_code in (os.CLD_KILLED, os.CLD_DUMPED) else None
                time.sleep(0.01)
        return None

    def _read(self, size: int, until: float) -> bytes:
        parts, left = [], size
        poller = select.poll()  # not select, which takes no more than 1,024 open files
        poller.register(self._answers, select.POLLIN)
        while left:
            if not poller.poll(max(0.0, until - time.monotonic()) * 1000):
                raise TimeoutError
            part = os.read(self._answers, min(left, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def _understood(self, answer: Mapping[str, Any]) -> Any:
        if "error" in answer:
            raise TokenizerError(f"{self._where}: {answer['error']}")
        return answer["found"]


class _Tokenizer:
    """What the child does."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self._held: Any = None

    def __call__(self, question: Mapping[str, Any]) -> Any:
        do, options = question["do"], question.get("options", {})
        if do == "load":
            return self._opened()
        if self._held is None:  # in this process, where systems cannot fork
            self._held = self._load()
        tokenizer: Any = self._held
        if do == "encode":
            found = tokenizer(question["text"], **options)
            return {name: list(values) for name, values in found.items()}
        if do == "decode":
            return tokenizer.decode(question["ids"], **options)
        made = tokenizer.apply_chat_template(question["turns"], **options)
        return made if isinstance(made, str | list) else dict(made)

    def _opened(self) -> str | None:
        """Load it, and try its rules; what cannot be loaded is left for the parent to say in its own words."""
        try:
            self._held = self._load()
        except Exception as error:
            return first_line(error)
        tokenizer: Any = self._held
        for probe in _PROBES:
            with contextlib.suppress(Exception):  # what fails is said when it is used; what never ends, now
                tokenizer.decode(tokenizer(probe, add_special_tokens=False)["input_ids"])
        return None


_FAILURES = {
    "load": "its tokenizer cannot be read",
    "encode": "its tokenizer cannot encode the text",
    "decode": "its tokenizer cannot decode its tokens",
    "template": "its chat template fails",
}


def _answered(tokenizer: _Tokenizer, question: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {"found": tokenizer(question)}
    except (KeyboardInterrupt, SystemExit):
        raise
    except MemoryError:
        return {"error": f"{_FAILURES[question['do']]}: it takes too much memory."}
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        return {"error": f"{_FAILURES[question['do']]}: {first_line(error)}"}


def _serve(tokenizer: _Tokenizer, questions: int, answers: int, others: Sequence[int]) -> NoReturn:
    """Answer until the other side is gone."""
    code = 0
    gc.freeze()  # a session of onnxruntime that the parent left would wait for its threads, which are not here
    try:
        for each in others:
            os.close(each)
        _close_all_but(questions, answers)  # a lock of this process would outlive it in the child
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):  # a panic is told on standard error, which is the user's
            os.dup2(nowhere, stream)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not here
        while True:
            (length,) = _LENGTH.unpack(_exactly(questions, _LENGTH.size))
            question = json.loads(_exactly(questions, length))
            _limit_time(question["seconds"])
            _limit_memory(_MOST_BYTES + _BYTES_PER_CHARACTER * question["size"])
            _write(answers, _encoded(_answered(tokenizer, question)))
    except (EOFError, BrokenPipeError):
        pass
    except BaseException:
        code = 1
    finally:
        os._exit(code)


def _close_all_but(*kept: int) -> None:
    first = 3
    for each in (*sorted(kept), 1 << 16):
        os.closerange(first, each)
        first = each + 1


def _encoded(answer: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(answer).encode()
    except (TypeError, ValueError, MemoryError) as error:
        return json.dumps(
            {"error": f"its tokenizer gives what is no text or ids: {first_line(error)}"}
        ).encode()


def _limit_time(more_seconds: float) -> None:
    """Let this process compute for so long; then SIGXCPU ends it."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        most = math.ceil(used.ru_utime + used.ru_stime + more_seconds)
        if hard not in (_NO_LIMIT, resource.RLIM_INFINITY):
            most = min(most, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (most, hard))


def _limit_memory(more_bytes: int) -> None:
    """Let this process have so much more; the limit of an earlier question may be raised again."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        import psutil

        held = psutil.Process().memory_info().vms
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = held + more_bytes
        if hard not in (_NO_LIMIT, resource.RLIM_INFINITY):
            most = min(most, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _write(handle: int, data: bytes) -> None:
    view = memoryview(_LENGTH.pack(len(data)) + data)
    while view:
        view = view[os.write(handle, view) :]


def _exactly(handle: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(handle, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _end(pid: int, owner: int, handles: Sequence[int]) -> None:
    if os.getpid() != owner:
        return
    for handle in handles:
        with contextlib.suppress(OSError):
            os.close(handle)
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def first_line(error: BaseException) -> str:
    """Of its message, at most 200 characters; its type, if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

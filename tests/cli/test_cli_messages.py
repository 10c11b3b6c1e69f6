"""--quiet, --verbose and --log-file of every command, and what a mistake of ours looks like."""

from __future__ import annotations

import errno
import logging
import re
import sys
import tempfile
import warnings

import click
import pytest

from edkm_export.cli import inspect as inspect_command
from edkm_export.cli.main import cli


@pytest.fixture
def commands() -> dict[str, click.Command]:
    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


def test_every_command_has_them(commands):
    assert len(commands) >= 9
    for name, command in commands.items():
        options = [option for parameter in command.params for option in parameter.opts]
        for option in ("--quiet", "-q", "--verbose", "-v", "--log-file"):
            assert options.count(option) == 1, (name, option)


def test_every_choice_is_taken_in_any_case(commands):
    choices = [
        (name, parameter)
        for name, command in commands.items()
        for parameter in command.params
        if isinstance(parameter.type, click.Choice)
    ]
    assert choices
    for name, parameter in choices:
        for choice in parameter.type.choices:
            for written in (str(choice).upper(), str(choice).lower()):
                assert parameter.type.convert(written, parameter, None) == choice, (name, parameter.name)


def test_every_option_is_explained_once(commands):
    for name, command in commands.items():
        with click.Context(command, info_name=name, terminal_width=80) as context:
            text = command.get_help(context)
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert parameter.help, (name, parameter.name)
                long = next(option for option in parameter.opts if option.startswith("--"))
                lines = re.findall(rf"^  (?:-\w, )?{long}(?:,| |$)", text, flags=re.MULTILINE)
                assert len(lines) == 1, (name, long)
        assert all(len(line) <= 80 for line in text.splitlines()), name


def test_help_of_train_is_in_groups(commands):
    with click.Context(commands["train"], info_name="train") as context:
        text = commands["train"].get_help(context)
    headings = re.findall(r"^(\S.*):$", text, flags=re.MULTILINE)
    assert headings[:3] == ["Model and data", "Bits", "How long"] and headings[-1] == "Messages"
    assert text.index("Bits:") < text.index("--target-bits BITS") < text.index("How long:")


def test_quiet_leaves_the_result(edkm, saved):
    loud = edkm("inspect", saved)
    quiet = edkm("inspect", saved, "--quiet")
    assert quiet.status == 0 and quiet.out == loud.out != "" and quiet.err == ""


def test_quiet_leaves_errors(edkm, work):
    result = edkm("inspect", "gone.pt", "-q")
    assert result.status == 2 and result.message.startswith("gone.pt: no such file")


def test_quiet_palettize_says_nothing(edkm, work, small_folder):
    result = edkm("palettize", small_folder, "--quiet")
    assert (result.status, result.out, result.err) == (0, "", "")
    assert (work / "model.pt").is_file()


def test_quiet_and_verbose_contradict_each_other(edkm, saved):
    result = edkm("inspect", saved, "-q", "-v")
    assert result.status == 2 and "contradict each other" in result.err


def test_verbose_shows_versions_times_and_logs(edkm, saved, monkeypatch):
    monkeypatch.setattr(
        inspect_command, "_describe_checkpoint", talking(inspect_command._describe_checkpoint)
    )
    plain, verbose = edkm("inspect", saved), edkm("inspect", saved, "--verbose")
    assert verbose.out == plain.out
    assert "some_library: a remark" not in plain.err and "some_library: a remark" in verbose.err
    assert re.search(r"edkm-export \d.*, Python 3", verbose.err) and "torch 2" in verbose.err
    assert re.search(r"inspect: took \d+\.\d s", verbose.err)
    assert logging.getLogger().getEffectiveLevel() > logging.INFO  # as it was before


def talking(function):
    """The same, from within a library that logs and warns."""

    def wrapped(*arguments):
        logging.getLogger("some_library").info("a remark")
        warnings.warn("a warning", stacklevel=1)
        return function(*arguments)

    return wrapped


def test_log_file_holds_everything(edkm, saved, work, monkeypatch):
    monkeypatch.setattr(
        inspect_command, "_describe_checkpoint", talking(inspect_command._describe_checkpoint)
    )
    result = edkm("inspect", saved, "--log-file", "log.txt")
    text = (work / "log.txt").read_text(encoding="utf-8")
    lines = text.splitlines()
    timed = [line for line in lines if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ", line)]
    assert len(timed) >= len(lines) - 2  # a warning of Python has lines of its own
    for line in result.out.splitlines():
        assert line in text
    assert "a remark" in text and "a warning" in text and "hashing: ended after" in text
    assert "\x1b" not in text and "some_library" not in result.err
    edkm("inspect", "gone.pt", "--log-file", "log.txt", "--quiet")
    longer = (work / "log.txt").read_text(encoding="utf-8")
    assert longer.startswith(text) and "ERROR" in longer and "gone.pt: no such file" in longer


def test_log_file_that_cannot_be_written(edkm, saved, work):
    result = edkm("inspect", saved, "--log-file", work / "no" / "log.txt")
    assert result.status == 2 and "--log-file" in result.message and "choose another" in result.message
    assert result.out == ""


def broken(*_: object) -> None:
    raise KeyError("a mistake")


class Panic(BaseException):
    """As libraries in Rust raise: no Exception."""


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("even this fails")


def leave(*_: object) -> None:
    sys.exit(1)  # which would say that verification failed


def recurse(*_: object) -> None:
    recurse()


def raising(error: BaseException):
    def wrapped(*_: object) -> None:
        raise error

    return wrapped


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (broken, "KeyError: 'a mistake'"),
        (raising(Panic("in Rust\nand more")), "Panic: in Rust"),
        (raising(Unprintable()), "Unprintable"),
        (leave, "SystemExit: 1"),
        (recurse, "RecursionError: maximum recursion depth exceeded"),
        (raising(AssertionError()), "AssertionError"),
    ],
    ids=["error", "panic", "unprintable", "exit", "recursion", "assertion"],
)
def test_mistake_of_ours(edkm, saved, work, tmp_path, monkeypatch, verbose, log, fault, words):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(inspect_command, "_describe_checkpoint", fault)
    options = [*(["--log-file", "log.txt"] if log else []), *(["--verbose"] if verbose else [])]
    result = edkm("inspect", saved, *options)
    assert result.status == 70
    (line,) = [line for line in result.err.splitlines() if line.startswith("edkm-export: ")]
    assert (
        line.startswith(f"edkm-export: this is our mistake, not yours: {words}") and "report it with" in line
    )
    assert result.err.endswith(f"{line}\n")
    assert ("Traceback" in result.err) is verbose and ("--verbose" in line) is not verbose
    (path,) = [work / "log.txt"] if log else temporary.iterdir()
    assert path.name in line
    text = path.read_text(encoding="utf-8")
    assert "Traceback" in text or fault.__name__ in text
    assert "edkm-export" in text and str(saved) in text
    assert log is (list(temporary.iterdir()) == [])


def test_mistake_of_ours_without_a_place_for_the_log(edkm, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    monkeypatch.setattr(inspect_command, "_describe_checkpoint", broken)
    result = edkm("inspect", saved)
    assert result.status == 70 and "report it with the output of --verbose" in result.message


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        ),
        RuntimeError("can't start new thread"),
        ImportError("libtorch.so: failed to map segment from shared object"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_no_mistake_of_ours(edkm, saved, monkeypatch, error):
    monkeypatch.setattr(inspect_command, "_describe_checkpoint", raising(error))
    result = edkm("inspect", saved)
    assert result.status == 2 and result.message.startswith("out of memory; ")


def test_too_many_open_files_are_no_mistake_of_ours(edkm, saved, monkeypatch):
    error = OSError(errno.EMFILE, "Too many open files", "model.pt")
    monkeypatch.setattr(inspect_command, "_describe_checkpoint", raising(error))
    result = edkm("inspect", saved)
    assert result.status == 2 and "ulimit -n" in result.message


def test_a_mistake_with_a_name_that_is_not_utf8():
    from edkm_export.cli.mistakes import in_one_line

    assert in_one_line(ValueError("a name \udcff")) == "ValueError: a name \\udcff"

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.paths import FIXTURES

COMMANDS = ["palettize", "coreml", "verify", "generate", "inspect"]
BACK_ENDS = ("torch", "transformers", "coremltools", "numba")


def modules_after(*arguments: str) -> tuple[int, str, set[str]]:
    """Exit status, standard output, and which back ends were imported by a fresh interpreter."""
    program = (
        "import sys\n"
        "from edkm_export.cli.main import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as exit:\n"
        "    status = exit.code\n"
        f"print('imported:', *(name for name in {BACK_ENDS} if name in sys.modules))\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    out, _, imported = done.stdout.rpartition("imported:")
    return done.returncode, out, set(imported.split())


@pytest.mark.parametrize(
    "arguments", [[], *([command] for command in COMMANDS)], ids=lambda words: " ".join(words)
)
def test_help_does_not_wait_for_torch(arguments):
    status, out, imported = modules_after(*arguments, "--help")
    assert status == 0 and out.startswith("Usage:") and "--help" in out
    assert imported == set()


def test_version_does_not_wait_for_torch():
    from edkm_export._version import __version__

    status, out, imported = modules_after("--version")
    assert (status, imported) == (0, set()) and __version__ in out


def test_help_lists_the_commands(edkm):
    out = edkm("--help").out
    for command in COMMANDS:
        assert f"  {command} " in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(edkm, command):
    result = edkm(command, "--help")
    assert result.status == 0 and f" {command} [OPTIONS]" in result.out
    assert edkm(command, "-h").out == result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-command"], "No such command 'no-such-command'"),
        (["--no-such-option"], "--no-such-option"),
        (["palettize"], "Missing argument 'MODEL'"),
        (["palettize", "model", "--bits", "four"], "'four' is not a valid integer"),
        (["palettize", "model", "--lut-dtype", "int2"], "'int2' is not one of 'float16', 'int8'"),
        (["palettize", "model", "--calibration-tokens", "1"], "1 is not in the range x>=2"),
        (
            ["palettize", str(FIXTURES / "tiny-llama"), "--recipe", "4bit", "--bits", "3"],
            "leave --bits, --group-size and --lut-dtype out",
        ),
        (["coreml"], "Missing argument 'MODEL.PT'"),
        (["coreml", str(FIXTURES / "heldout.txt"), "--tokens", "0"], "0 is not in the range x>=2"),
        (["verify"], "Missing argument '[MODEL.PT] OUT'"),
        (["inspect"], "Missing argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(edkm, arguments, message):
    result = edkm(*arguments)
    assert result.status == 2 and message in result.err and "Traceback" not in result.err
    assert result.out == ""


def test_no_command_shows_the_help(edkm):
    result = edkm()
    assert result.status in (0, 2) and "[OPTIONS] COMMAND" in result.out + result.err


def test_library_needs_no_back_end():
    program = (
        "import sys, edkm_export; print([name for name in ('coremltools', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"

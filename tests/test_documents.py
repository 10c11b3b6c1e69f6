"""What the documents say of the project is so: links, commands, options, files, names and thresholds."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from edkm_export._version import __version__
from edkm_export.cli.main import cli
from edkm_export.errors import EdkmExportError
from edkm_export.recipe import PRESETS
from tests.helpers.paths import ROOT

README_WORDS = 1300  # what a newcomer reads in five minutes

DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "fixtures" / "tiny-llama" / "README.md"]
)
FOLDERS = ("edkm_export", "converters", "tests", "benchmarks", "fixtures", "docs")
FILES = {
    path.relative_to(ROOT).as_posix()
    for path in itertools.chain(ROOT.iterdir(), *((ROOT / folder).rglob("*") for folder in FOLDERS))
    if path.is_file()
}
COMMANDS = {name: cli.get_command(click.Context(cli), name) for name in cli.list_commands(click.Context(cli))}
# Options of other programs that the documents name.
FOREIGN = {
    "torchrun": {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"},
    "accelerate": {"--multi_gpu", "--num_processes"},
    "pip": {"--index-url"},
    "make_tiny_llama": {"--minutes", "--steps"},
}
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")

each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)


def prose(document: Path) -> str:
    """Without fenced blocks."""
    return re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.S | re.M)


def inline_code(document: Path) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(document))]


def code_lines(document: Path) -> list[str]:
    """Lines of fenced and of indented blocks, continued ones joined, comments left out."""
    text = document.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(?!mermaid)[^\n]*\n(.*?)^```", text, flags=re.S | re.M)
    indented = re.findall(r"^ {4,}\S.*$", prose(document), flags=re.M)
    joined = "\n".join([*fenced, *indented]).replace("\\\n", " ")
    return [re.sub(r"(^|\s)#\s.*", "", line).strip() for line in joined.splitlines()]


def options_of(command: click.Command) -> set[str]:
    named = (parameter for parameter in command.params if isinstance(parameter, click.Option))
    return {"--help", *(name for option in named for name in (*option.opts, *option.secondary_opts))}


def options_in(script: Path) -> set[str]:
    return {"--help", *OPTION.findall(script.read_text(encoding="utf-8"))}


def calls(line: str) -> Iterator[tuple[str, str]]:
    """Each command of ours in a line: its name, and what follows it."""
    for found in re.finditer(r"(?:edkm-export|-m edkm_export) ([a-z]\w*)([^|&;]*)", line):
        yield found[1], found[2]


def anchors(document: Path) -> set[str]:
    """Headings as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.*)$", prose(document), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS


@each_document
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{target} does not exist"
        assert path.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(path), f"{target}: no such heading"


def test_every_document_can_be_found_from_the_readme():
    linked = set(re.findall(r"\]\(([^)#\s]+)", prose(ROOT / "README.md")))
    ours = {
        path.relative_to(ROOT).as_posix() for path in DOCUMENTS if path.parent != ROOT / "fixtures/tiny-llama"
    }
    assert ours - linked == {"README.md"}


@each_document
def test_files_exist(document):
    """Python files by the end of their path, other things by their whole path; capitals are placeholders."""
    for span in inline_code(document):
        word = span.split()[0].rstrip("/")
        if re.fullmatch(r"[\w./*-]+", word) is None or re.search(r"\b(NAME|FAMILY|MODEL|RUN|OUT)\b", word):
            continue
        if word.startswith(tuple(f"{folder}/" for folder in FOLDERS)):
            assert list(ROOT.glob(word)), f"{word} does not exist"
        elif word.endswith(".py") and "*" not in word:
            assert any(f"/{name}".endswith(f"/{word}") for name in FILES), f"{word} does not exist"


@each_document
def test_modules_and_names_exist(document):
    for span in inline_code(document):
        if (
            re.fullmatch(r"(edkm_export|converters|benchmarks)(\.\w+)+", span) is None
            or span == "edkm_export.format"
        ):
            continue
        parts = span.split(".")
        if parts[0] == "edkm_export" and document.name == "onnx.md" and len(parts) == 2:
            continue  # keys of metadata_props
        known = [
            size
            for size in range(1, len(parts) + 1)
            if (ROOT.joinpath(*parts[:size]).with_suffix(".py")).is_file()
            or ROOT.joinpath(*parts[:size]).is_dir()
        ]
        rest = parts[max(known) :]
        assert len(rest) <= 1, f"{span}: no such module"
        if rest:
            home = ROOT.joinpath(*parts[: max(known)])
            file = home / "__init__.py" if home.is_dir() else home.with_suffix(".py")
            assert re.search(rf"\b{rest[0]}\b", file.read_text(encoding="utf-8")), f"{span}: no such name"


@each_document
def test_scripts_and_tests_exist(document):
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"-m benchmarks\.(\w+)", text):
        assert name == "NAME" or f"benchmarks/{name}.py" in FILES, f"benchmarks.{name} does not exist"
    for path in re.findall(r"(?<![\w/])tests/[\w/]+(?:\.py)?", text):
        assert (ROOT / path).exists() or list(ROOT.glob(f"{path}*")), f"{path} does not exist"
    tests = {name for name in FILES if name.startswith("tests/") and name.endswith(".py")}
    for name in re.findall(r"`(test_\w+)`", text):
        assert any(f"def {name}(" in (ROOT / file).read_text(encoding="utf-8") for file in tests), name
    for target in re.findall(r"(?:^ {4}|`)make ([\w-]+)", text, flags=re.M):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), f"make {target}"


@each_document
def test_commands_parse(document):
    """As click would take them, up to the files that they name."""
    for line in code_lines(document):
        if "[-" in line:  # a synopsis; its options are looked up below
            continue
        for name, rest in calls(line):
            assert name in COMMANDS, f"{line}: no command {name}"
            arguments = shlex.split(rest)
            if "..." in arguments:
                continue
            try:
                COMMANDS[name].make_context(name, arguments)
            except click.exceptions.Exit as exit:  # --help
                assert exit.exit_code == 0
            except click.UsageError as error:
                pytest.fail(f"{line}: {error.format_message()}")
            except EdkmExportError as error:
                assert "no such" in str(error), line


@each_document
def test_options_exist(document):
    """Behind a command, its own; behind a script, the script's; alone, of any command or script."""
    scripts = {path.stem: options_in(path) for path in (ROOT / "benchmarks").glob("*.py")}
    ours = set().union(*scripts.values(), *map(options_of, COMMANDS.values()), {"--version"})
    for span in [*inline_code(document), *code_lines(document)]:
        first = span.split()[0] if span else ""
        script = re.search(r"-m benchmarks\.(\w+)", span)
        found = list(calls(span))
        foreign = set().union(*(options for program, options in FOREIGN.items() if program in span))
        if script is not None and script[1] in scripts:
            assert set(OPTION.findall(span)) <= scripts[script[1]], span
        elif found:
            for name, rest in found:
                assert name in COMMANDS, f"{span}: no command {name}"
                assert set(OPTION.findall(rest)) <= options_of(COMMANDS[name]), span
            before = span.partition("edkm")[0]
            assert set(OPTION.findall(before)) <= foreign, span
        elif first in COMMANDS:
            assert set(OPTION.findall(span)) <= options_of(COMMANDS[first]), span
        elif "install" not in span:
            assert set(OPTION.findall(span)) <= ours | foreign, span


def table_after(document: Path, heading: str) -> list[list[str]]:
    """Cells of the first table under a heading, without its head."""
    text = document.read_text(encoding="utf-8").partition(f"{heading}\n")[2]
    found = re.search(r"(?:^\|.*\|\n)+", text, flags=re.M)
    assert found is not None
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in found[0].splitlines()]
    return rows[2:]


def test_every_command_is_listed():
    rows = table_after(ROOT / "docs" / "commands.md", "# Commands")
    assert {re.findall(r"`(\w+)", row[0])[0] for row in rows} == set(COMMANDS)


def test_every_preset_is_listed():
    rows = table_after(ROOT / "docs" / "recipes.md", "`--recipe FILE.yaml`, or a preset:")
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row[0])} == set(PRESETS)


def test_extras_exist():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^(\w+) = \[", project.partition("optional-dependencies]")[2], flags=re.M))
    rows = table_after(ROOT / "docs" / "commands.md", "## Extras")
    assert (
        {row[0].strip("`") for row in rows}
        == {"coreml", "onnx", "coreai", "gguf", "peft", "train", "moments", "eval"}
        < extras
    )
    hints = {
        extra
        for name in FILES
        if name.endswith((".py", ".md"))
        for found in re.findall(r"edkm-export\[([\w,]+)\]", (ROOT / name).read_text(encoding="utf-8"))
        for extra in found.split(",")
    }
    assert hints <= extras


def test_the_version_has_one_place():
    """And the changelog has a dated section for it."""
    told = re.compile(rf"(?i)version[\W_]+{re.escape(__version__)}")
    sources = [name for name in FILES if name.endswith((".py", ".toml", ".yml", ".yaml", "Makefile"))]
    telling = {name for name in sources if told.search((ROOT / name).read_text(encoding="utf-8"))}
    assert telling == {"edkm_export/_version.py"}
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$", changelog, flags=re.M)
    assert sections[0] == ("Unreleased", "")
    assert sections[1][0] == __version__ and sections[1][1]


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", [ROOT / ".pre-commit-config.yaml", *WORKFLOWS], ids=lambda path: path.name)
def test_settings_of_servers_are_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)

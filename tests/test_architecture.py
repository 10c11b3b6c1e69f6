"""The import rules of docs/architecture.md: each keeps a promise of the product, and each is read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGES = ("edkm_export", "converters")

# From the ground up. A module imports what is on lower floors, and on its own floor only in its own part.
FLOORS: tuple[tuple[str, ...], ...] = (
    # the currency: no model, no file format
    (
        "edkm_export._version",
        "edkm_export.errors",
        "edkm_export.interrupts",
        "edkm_export.machine",
        "edkm_export.activity",
        "edkm_export.command_line",
        "edkm_export.disk_space",
        "edkm_export.library_logs",
        "edkm_export.limits",
        "edkm_export.mapped_files",
        "edkm_export.claims",
        "edkm_export.filesystem",
        "edkm_export.memory",
        "edkm_export.memory_budget",
        "edkm_export.versions",
        "edkm_export.array_input",
        "edkm_export.quantities",
        "edkm_export.text",
        "edkm_export.token_ids",
        "edkm_export.context_window",
        "edkm_export.kv_cache",
        "edkm_export.detokenize",
        "edkm_export.stop_texts",
        "edkm_export.special_floats",
        "edkm_export.end_tokens",
        "edkm_export.prompt",
        "edkm_export.atomic",
        "edkm_export.digest",
        "edkm_export.hub_id",
        "edkm_export.regular_file",
        "edkm_export.yaml_text",
        "edkm_export.escaping",
        "edkm_export.torch_archive",
        "edkm_export.guarded_tokenizer",
        "edkm_export.config_bounds",
        "edkm_export.taking_turns",
        "edkm_export.beside",
        "edkm_export.checkpoint_record",
        "edkm_export.embedding_settings",
        "edkm_export.unfinished",
        "edkm_export.packing",
        "edkm_export.local_paths",
        "edkm_export.plain_data",
        "edkm_export.lut_dtypes",
        "edkm_export.lut_grid",
        "edkm_export.palette",
    ),
    (
        "edkm_export.checkpoint",
        "edkm_export.checkpoint_digest",
        "edkm_export.model_card",
        "edkm_export.embedding_card",
        "edkm_export.sentence_documents",
        "edkm_export.device_lint",
        "edkm_export.recipe",
        "edkm_export.weight_storage",
        "edkm_export.clustering",
        "edkm_export.finalized_palettes",
    ),
    ("edkm_export.reference", "edkm_export.decoder", "edkm_export.compensated_weight"),
    ("edkm_export.artifact", "edkm_export.calibration", "edkm_export.importing"),
    ("edkm_export.propagation",),
    ("edkm_export.palettization",),
    ("edkm_export.loss_estimate", "edkm_export.forecast"),
    ("edkm_export.training", "converters", "edkm_export.verify"),
    ("edkm_export.api",),  # what commands and Python functions share
    ("edkm_export",),  # the names that it offers
    ("edkm_export.cli",),
    ("edkm_export.__main__",),
)

# Who never imports whom, and what that keeps.
NEVER: dict[tuple[str, str], str] = {
    ("edkm_export.decoder", "edkm_export.reference"): "the reference shares no mistake with our decoder",
    ("edkm_export.reference", "edkm_export.decoder"): "the reference shares no mistake with our decoder",
    ("edkm_export.verify", "edkm_export.decoder"): "hard PyTorch is transformers' own model",
    ("edkm_export.verify", "converters"): "the ladder knows no format",
    ("converters", "edkm_export.verify"): "an artifact does not know how it is judged",
    ("converters", "edkm_export.training"): "an export needs a checkpoint, not a run",
    ("converters.coreml.read", "converters.coreml.write"): "what is on disk is checked",
    ("converters.onnx.read", "converters.onnx.write"): "what is on disk is checked",
    ("converters.coreai.read", "converters.coreai.write"): "what is on disk is checked",
    ("converters.coreml.read", "edkm_export.decoder"): "what is on disk is checked",
    ("converters.onnx.read", "edkm_export.decoder"): "what is on disk is checked",
    ("converters.coreai.read", "edkm_export.decoder"): "what is on disk is checked",
    ("converters.coreml", "converters.onnx"): "a format can be changed alone",
    ("converters.onnx", "converters.coreml"): "a format can be changed alone",
    ("converters.coreai", "converters.coreml"): "a format can be changed alone",
    ("converters.coreai", "converters.onnx"): "a format can be changed alone",
    ("converters.coreml", "converters.coreai"): "a format can be changed alone",
    ("converters.onnx", "converters.coreai"): "a format can be changed alone",
    ("edkm_export.training", "converters"): "training runs where no converter is installed",
    ("edkm_export.artifact", "converters"): "any format can take part",
}

# palettized modules serve alone ("the paper's method on other layers"): nothing of the training run
PALETTIZED = "edkm_export.training.palettized"
# each needs a back end that may not be installed
OPTIONAL = (
    "coreai",
    "coreai_opt",
    "coreai_torch",
    "coremltools",
    "onnx",
    "onnxruntime",
    "gguf",
    "matplotlib",
    "lm_eval",
    "peft",
    "torchao",
    "triton",
)


def sources() -> dict[str, Path]:
    """{dotted name of a module: its file}."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def imports(path: Path) -> Iterator[tuple[str, str | None, int]]:
    """Each import in a file, those inside functions too: module, name taken from it, line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                yield node.module, alias.name, node.lineno


def edges() -> list[tuple[str, str, int]]:
    """Importing module, imported module of ours, line."""
    found = []
    for module, path in SOURCES.items():
        for source, name, line in imports(path):
            if source.split(".")[0] in PACKAGES:
                inner = f"{source}.{name}"
                found.append((module, inner if inner in SOURCES else source, line))
    return found


EDGES = edges()


def within(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}.")


def floor(module: str) -> tuple[int, str]:
    """Number of the floor, and the part of it."""
    found = [
        (len(part), number, part)
        for number, parts in enumerate(FLOORS)
        for part in parts
        if within(module, part) and (part != "edkm_export" or module == part)
    ]
    assert found, f"{module} has no place in FLOORS"
    _, number, part = max(found)
    return number, part


def test_dependencies_point_one_way():
    """cli -> training, converters, verify -> artifact -> decoder | reference -> checkpoint, clustering -> palette."""
    wrong = []
    for module, imported, line in EDGES:
        (own, own_part), (other, other_part) = floor(module), floor(imported)
        beside = own == other and own > 1 and own_part != other_part
        if other > own or beside:
            wrong.append(f"{module}:{line} imports {imported}")
    assert not wrong


@pytest.mark.parametrize(("who", "whom"), NEVER, ids=lambda part: part)
def test_walls(who, whom):
    wrong = [
        f"{module}:{line} imports {imported}"
        for module, imported, line in EDGES
        if within(module, who) and within(imported, whom)
    ]
    assert not wrong, NEVER[who, whom]


@pytest.mark.parametrize("part", sorted({part for pair in NEVER for part in pair}))
def test_walls_stand_around_something(part):
    """A rule about a part that was renamed would hold for nothing."""
    assert any(within(module, part) for module in SOURCES)


def test_palettized_modules_serve_alone():
    wrong = [
        f"{module}:{line} imports {imported}"
        for module, imported, line in EDGES
        if within(module, PALETTIZED)
        and within(imported, "edkm_export.training")
        and not within(imported, PALETTIZED)
    ]
    assert not wrong


def test_only_the_doors_open_any_format():
    """Whoever imports two converters knows formats apart."""
    knows: dict[str, set[str]] = defaultdict(set)
    for module, imported, _ in EDGES:
        parts = imported.split(".")
        if parts[0] == "converters" and len(parts) > 1:
            knows[module].add(parts[1])
    several = {module for module, formats in knows.items() if len(formats) > 1}
    assert all(within(module, "edkm_export.cli") or within(module, "edkm_export.api") for module in several)


def test_no_private_names_of_other_packages():
    wrong = []
    for module, path in SOURCES.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for source, name, line in imports(path):
            taken = [part for part in (*source.split("."), name or "") if part.startswith("_")]
            private = [part for part in taken if part not in ("_version", "__version__")]
            if source.split(".")[0] in PACKAGES and private:
                home = source if f"{source}.__init__" in SOURCES else source.rpartition(".")[0]
                if home != package and source != package:
                    wrong.append(f"{module}:{line} takes {source}.{name}")
    assert not wrong


def test_base_names_are_told_apart():
    """A base name occurs twice only where two converters hold the same noun."""
    places: dict[str, set[str]] = defaultdict(set)
    for module, path in SOURCES.items():
        if path.name in ("__init__.py", "__main__.py"):
            continue
        parts = module.split(".")
        noun = ".".join(parts[2:]) if parts[0] == "converters" else module
        places[parts[-1]].add(noun)
    assert not {name: sorted(nouns) for name, nouns in places.items() if len(nouns) > 1}


@pytest.mark.parametrize(
    "module",
    [
        "edkm_export",
        "converters.coreml",
        "converters.onnx",
        "converters.coreai",
        "converters.coreai.read.asset",
        "edkm_export.training.run",
        "edkm_export.training.palettized.modules",
        "edkm_export.cli.main",
        "edkm_export.verify.ladder",
    ],
)
def test_back_ends_are_imported_when_they_are_needed(module):
    """`import edkm_export` needs none of them, training runs without coremltools, and `verify` without any."""
    code = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.split(".")[0] in {OPTIONAL!r} else find(name, *rest)
)
import {module}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_remote_code_is_never_trusted():
    """Every loader of transformers is told so in words, for its default is not ours to rely on."""
    loaders = {"from_pretrained"}
    wrong = []
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in loaders
            ):
                told = [word.value for word in node.keywords if word.arg == "trust_remote_code"]
                if not told or not isinstance(told[0], ast.Constant) or told[0].value is not False:
                    wrong.append(f"{module}:{node.lineno}")
    assert not wrong

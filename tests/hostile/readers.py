"""Every reader of the project: a sound input of each, how it is damaged, what is done with it, and how it is judged.

What is accepted must be the same model: logits of a damaged artifact, on texts that the verification does not use, are
those of the sound one, or `verify` fails.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.hostile.archives import change_archive, odd_tensor
from tests.hostile.harness import Step, command
from tests.hostile.oddities import (
    NUMBERS,
    TEXTS,
    change_bytes,
    change_file,
    change_json,
    change_tree,
)
from tests.hostile.protobuf import change_message

__all__ = ["READERS", "Reader", "Seeds"]

_TEXT = "The quick brown fox jumps over the lazy dog, and then it rests for a while in the shade. " * 4
_PROBE = (3, 77, 12, 200, 45, 300, 8, 9, 150, 31, 64, 2)
_HEAD = 4096


@dataclass(frozen=True)
class Seeds:
    """Sound inputs.

    Attributes:
        folder: of all of them.
        logits: what each model gives for `_PROBE`, by name.
        kept: what else is needed more than once.
    """

    folder: Path
    logits: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> Path:
        """An evaluation text."""
        return self.folder / "text.txt"


@dataclass(frozen=True)
class Reader:
    """One of them.

    Attributes:
        name: of the reader, and of the folder of its sound input.
        make: makes that folder.
        damage: changes an input in a folder; says how.
        steps: what is done with it.
        available: why it cannot be tried here; empty: it can.
    """

    name: str
    make: Callable[[Seeds, Path], None]
    damage: Callable[[random.Random, Path, Seeds], str]
    steps: Callable[[random.Random, Path, Seeds], Sequence[Step]]
    available: Callable[[], str] = lambda: ""


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _any_file(draw: random.Random, folder: Path) -> str:
    """What any folder can be: a file of it is something else, or damaged anywhere."""
    path = draw.choice(_files(folder))
    if draw.random() < 0.4:
        return change_file(draw, path)
    if path.suffix == ".json" and draw.random() < 0.7:
        return change_json(draw, path)
    return change_bytes(draw, path, _HEAD)


def _judged(name: str, seeds: Seeds, measure: Callable[[], np.ndarray[Any, Any]], verify: Step) -> Step:
    """Verify; what passes must compute what the sound input does."""

    def run() -> int:
        status = verify()
        if status != 0:
            return status
        found, expected = measure(), seeds.logits[name]
        if found.shape != expected.shape or not np.allclose(found, expected, atol=2e-2, rtol=2e-2):
            print("different, and verify passes")
            return 71
        return 0

    return run


def _session_logits(path: Path) -> np.ndarray[Any, Any]:
    from edkm_export.api.artifacts import open_session

    session, _ = open_session(path)
    return session.feed(list(_PROBE)).float().numpy()


# model.pt


def _make_checkpoint(seeds: Seeds, folder: Path) -> None:
    _run(command("palettize", seeds.folder / "source", "-o", folder / "model.pt", "--no-estimate"))


def _mend(contents: Any) -> None:
    """Bring the digests up to date, as someone would who means harm."""
    from edkm_export import checkpoint

    recorded = contents["provenance"]["sha256"]
    for key in recorded:
        recorded[key] = checkpoint._digest(contents[key])


def _damage_checkpoint(draw: random.Random, folder: Path, seeds: Seeds) -> str:
    if draw.random() < 0.08:
        return change_file(draw, folder / "model.pt")
    return change_archive(draw, folder / "model.pt", _mend)


def _checkpoint_logits(path: Path) -> np.ndarray[Any, Any]:
    from edkm_export.checkpoint import load
    from edkm_export.reference.hard_model import load_hard_model

    with torch.no_grad():
        return load_hard_model(load(path))(torch.tensor([_PROBE])).logits[0].float().numpy()


def _steps_checkpoint(draw: random.Random, folder: Path, seeds: Seeds) -> Sequence[Step]:
    path = folder / "model.pt"
    steps = [command("inspect", path)]
    steps.append(
        draw.choice(
            (
                command("generate", path, "--prompt", "ab", "--max-new-tokens", 2),
                command("coreml", path, "--dry-run"),
                command("onnx", path, "--no-verify", "-o", folder / "out"),
                command("generate", path, "--prompt", "ab", "--chat", "--max-new-tokens", 2),
                command("inspect", path, "--json"),
            )
        )
    )
    artifact = seeds.folder / "onnx"
    if artifact.is_dir():
        verify = _verify(path, artifact / "model.onnx", seeds)
        steps.append(_judged("checkpoint", seeds, lambda: _checkpoint_logits(path), verify))
    return steps


def _verify(checkpoint: Path, artifact: Path, seeds: Seeds) -> Step:
    return command("verify", checkpoint, artifact, "--text", seeds.text, "--tokens", 40, "-q")


def _run(step: Step) -> None:
    status = step()
    assert status == 0, status


def _make_export(*arguments: str) -> Callable[[Seeds, Path], None]:
    def make(seeds: Seeds, folder: Path) -> None:
        model = seeds.folder / "checkpoint" / "model.pt"
        _run(command(arguments[0], model, "-o", folder / "made", "--no-verify", *arguments[1:]))
        for path in (folder / "made").iterdir():
            path.rename(folder / path.name)
        (folder / "made").rmdir()

    return make


# Core ML


def _package(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("*.mlpackage"))), folder / "model.mlpackage")


def _damage_coreml(draw: random.Random, folder: Path, seeds: Seeds) -> str:
    from coremltools.proto import Model_pb2

    package = _package(folder)
    kind = draw.random()
    if kind < 0.6:
        path = next(package.rglob("*.mlmodel"))
        message = Model_pb2.Model()
        message.ParseFromString(path.read_bytes())
        words = []
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            if draw.random() < 0.1:
                words.append(_change_metadata(draw, message))
            else:
                words.append(change_message(draw, message))
        path.write_bytes(message.SerializeToString())
        return "; ".join(words)
    if kind < 0.8:
        return change_bytes(draw, next(package.rglob("weight.bin")))
    return _any_file(draw, package if draw.random() < 0.7 else folder)


def _change_metadata(draw: random.Random, message: Any) -> str:
    metadata = message.description.metadata.userDefined
    key = draw.choice(sorted(metadata) or [""])  # an earlier change may have left none
    try:
        tree = json.loads(metadata[key])
    except ValueError:
        tree = None
    if isinstance(tree, dict | list) and draw.random() < 0.8:
        words = change_tree(draw, tree)
        metadata[key] = json.dumps(tree)
        return f"metadata {key}: {words}"
    metadata[key] = draw.choice(
        [str(number) for number in NUMBERS]
        + [text for text in TEXTS if text != "\ud800"]
        + [json.dumps(["model.mlpackage"] * 1000), json.dumps(["..", "."])]
    )
    return f"metadata {key}: {metadata[key][:40]!r}"


def _steps_coreml(draw: random.Random, folder: Path, seeds: Seeds) -> Sequence[Step]:
    package = _package(folder)
    model = seeds.folder / "checkpoint" / "model.pt"
    return [
        command("inspect", package),
        draw.choice(
            (
                command("generate", folder, "--prompt", "ab", "--max-new-tokens", 2),
                command("run", package, "-o", folder / "out.npz"),
            )
        ),
        _judged("coreml", seeds, lambda: _session_logits(package), _verify(model, package, seeds)),
    ]


def _needs(*modules: str) -> Callable[[], str]:
    def available() -> str:
        import importlib.util

        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        return f"{', '.join(missing)} is not installed" if missing else ""

    return available


# ONNX


def _damage_onnx(draw: random.Random, folder: Path, seeds: Seeds) -> str:
    import onnx

    path = next(iter(folder.rglob("model.onnx")))
    kind = draw.random()
    if kind < 0.6:
        message = onnx.load(path, load_external_data=False)
        words = [change_message(draw, message) for _ in range(draw.choice((1, 1, 1, 2, 4)))]
        path.write_bytes(message.SerializeToString())
        return "; ".join(words)
    if kind < 0.75:
        return change_bytes(draw, next(folder.rglob("model.onnx_data")))
    return _any_file(draw, folder)


def _steps_onnx(draw: random.Random, folder: Path, seeds: Seeds) -> Sequence[Step]:
    model = seeds.folder / "checkpoint" / "model.pt"
    return [
        command("inspect", folder),
        command("generate", folder, "--prompt", "ab", "--max-new-tokens", 2),
        _judged("onnx", seeds, lambda: _session_logits(folder), _verify(model, folder, seeds)),
    ]


# Core AI


def _damage_coreai(draw: random.Random, folder: Path, seeds: Seeds) -> str:
    files = [path for path in _files(folder) if path.is_relative_to(next(folder.glob("*.aimodel")))]
    kind = draw.random()
    if kind < 0.6:
        return change_bytes(draw, max(files, key=lambda path: path.suffix == ".mlirb"), 1 << 16)
    if kind < 0.8:
        return change_bytes(draw, draw.choice(files), _HEAD)
    return _any_file(draw, folder)


def _steps_coreai(draw: random.Random, folder: Path, seeds: Seeds) -> Sequence[Step]:
    model = seeds.folder / "checkpoint" / "model.pt"
    asset = next(iter(folder.glob("*.aimodel")), folder)
    steps: list[Step] = [command("inspect", folder)]
    if draw.random() < 0.25:  # a process of Apple's runtime takes a second
        steps.append(_judged("coreai", seeds, lambda: _session_logits(asset), _verify(model, asset, seeds)))
    return steps


# GGUF


def _make_gguf(seeds: Seeds, folder: Path) -> None:
    from tests.helpers.gguf_writer import write

    write(seeds.kept["gguf"], folder / "model.gguf")


def _damage_gguf(draw: random.Random, folder: Path, seeds: Seeds) -> str:
    from tests.helpers.gguf_writer import write

    path = folder / "model.gguf"
    kind = draw.random()
    if kind < 0.05:
        return change_file(draw, path)
    if kind < 0.5:
        return "; ".join(change_bytes(draw, path, 16384) for _ in range(draw.choice((1, 1, 3))))
    made = seeds.kept["gguf"].copy()
    key = draw.choice(sorted(made.metadata))
    value = made.metadata[key]
    pool: list[Any] = [number for number in NUMBERS if isinstance(number, float) or 0 <= number < 2**32]
    pool = [
        number for number in pool if not isinstance(number, float) or abs(number) < 1e38 or number != number
    ]
    pool += [text for text in TEXTS if text != "\ud800"]
    if isinstance(value, list):
        value = list(value)
        pool = [each for each in pool if not isinstance(each, int) or each < 2**31]  # lists hold int32
        for _ in range(draw.choice((1, 10))):
            value[draw.randrange(len(value))] = draw.choice(
                [each for each in pool if type(each) is type(value[0])]
            )
        if draw.random() < 0.3:
            value = value[: draw.randrange(len(value)) or 1]
    else:
        value = draw.choice(pool)
    made.metadata[key] = value
    write(made, path)
    return f"{key}: {str(value)[:60]!r}"


def _steps_source(name: str) -> Callable[[random.Random, Path, Seeds], Sequence[Step]]:
    def steps(draw: random.Random, folder: Path, seeds: Seeds) -> Sequence[Step]:
        path = folder / name if name else folder
        made = folder.parent / f"{folder.name}.made.pt"

        def loads() -> int:
            status = command("palettize", path, "-o", made, "--no-estimate", "--overwrite")()
            if status == 0:
                from edkm_export.checkpoint import load

                load(made)
            made.unlink(missing_ok=True)
            return status

        return [command("inspect", path, *draw.choice(((), ("--json",)))), loads]

    return steps


# Hugging Face folder


def _make_source(seeds: Seeds, folder: Path) -> None:
    from tests.helpers.odd_models import build, save

    save(build("plain").half(), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _damage_source(draw: random.Random, folder: Path, seeds: Seeds) -> str:
    kind = draw.random()
    if kind < 0.4:
        return change_json(draw, folder / "config.json")
    if kind < 0.6:
        return change_json(
            draw, folder / draw.choice(("tokenizer.json", "tokenizer_config.json", "generation_config.json"))
        )
    if kind < 0.85:
        return _change_safetensors(draw, folder / "model.safetensors")
    return _any_file(draw, folder)


def _change_safetensors(draw: random.Random, path: Path) -> str:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    if draw.random() < 0.3:
        return change_bytes(draw, path, size + 64)
    header = json.loads(data[8 : 8 + size])
    words = change_tree(draw, header)
    changed = json.dumps(header).encode()
    changed += b" " * (-len(changed) % 8)
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + size :])
    return f"{path.name}: {words}"


# import


def _make_import(seeds: Seeds, folder: Path) -> None:
    from edkm_export.checkpoint import load

    state = load(seeds.folder / "checkpoint" / "model.pt").state_dict()
    state.pop("lm_head.weight", None)
    name = "model.layers.0.mlp.up_proj"
    lut = state[f"{name}.weight"].unique()
    entries = torch.cat((lut, lut[-1:].expand(256 - len(lut))))
    state[f"{name}._COREML_/weight/lut"] = entries.view(1, 1, -1, 1)
    state[f"{name}._COREML_/weight/compression_type"] = torch.tensor([2])
    state[f"{name}._COREML_/metadata_version"] = torch.tensor(1)
    torch.save(state, folder / "state.pt")


def _damage_import(draw: random.Random, folder: Path, seeds: Seeds) -> str:
    path = folder / "state.pt"
    if draw.random() < 0.5:
        state = torch.load(path, weights_only=True)
        marked = sorted(name for name in state if "_COREML_" in name or "up_proj" in name)
        name = draw.choice(marked if draw.random() < 0.6 else sorted(state))
        state[name] = odd_tensor(draw, state[name])
        if draw.random() < 0.3:
            state[
                f"{name.split('._COREML_')[0]}._COREML_/weight/{_BUFFERS[draw.randrange(len(_BUFFERS))]}"
            ] = odd_tensor(draw)
        torch.save(state, path)
        return f"{name}: {state[name].dtype} {list(state[name].shape)} {state[name].device}"
    return change_archive(draw, path)


_BUFFERS = (
    "lut", "compression_type", "palettization_scale", "quantization_scale", "quantization_n_bits", "zero_point",
    "vector_axis", "", "a/b",
)  # fmt: skip


def _steps_import(draw: random.Random, folder: Path, seeds: Seeds) -> Sequence[Step]:
    arguments = ("--model", seeds.folder / "source", "-o", folder / "out.pt")
    return [command("import", folder / "state.pt", *arguments, "--group-size", draw.choice((0, 16)))]


# Run folder


def _make_run(seeds: Seeds, folder: Path) -> None:
    from edkm_export.training import run_checkpoints

    kept, run_checkpoints.clear = run_checkpoints.clear, lambda _folder: None
    try:
        _run(_train(seeds, folder / "run"))
    finally:
        run_checkpoints.clear = kept
    (folder / "run" / "model.pt").unlink()


def _train(seeds: Seeds, folder: Path, *more: str) -> Step:
    return command(
        "train", seeds.folder / "source", "--data", seeds.text, "-o", folder, "--config", seeds.folder / "train.yaml",
        *more,
    )  # fmt: skip


def _damage_run(draw: random.Random, folder: Path, seeds: Seeds) -> str:
    path = draw.choice(_files(folder))
    kind = draw.random()
    if kind < 0.15:
        return change_file(draw, path)
    if path.suffix in (".pt", ".pth", ".tokens"):
        try:
            return f"{path.name}: {change_archive(draw, path)}"
        except Exception:
            return change_bytes(draw, path, _HEAD)
    if path.suffix == ".json":
        return change_json(draw, path)
    return change_bytes(draw, path)


def _steps_run(draw: random.Random, folder: Path, seeds: Seeds) -> Sequence[Step]:
    return [
        command("generate", folder / "run", "--prompt", "ab"),
        _train(seeds, folder / "run", "--resume"),
    ]


# YAML


_RECIPE = """\
name: mine
rules:
  - {match: "model.embed_tokens", bits: 8, group_size: 0}
  - {match: "*.mlp.down_proj", bits: 4, group_size: 8}
  - {match: "lm_head", skip: true, optional: true}
  - {match: "*", bits: 3, group_size: 16, lut_dtype: int8, fit_groups: true}
"""
_SETTINGS = """\
bits: 3
steps: 4
save_every: 2
context: 16
batch_size: 1
calibration_tokens: 64
eval_tokens: 64
target_decoder_bits: null
log_every: 1
"""


def _make_yaml(seeds: Seeds, folder: Path) -> None:
    (folder / "recipe.yaml").write_text(_RECIPE, encoding="utf-8")
    (folder / "train.yaml").write_text(_SETTINGS, encoding="utf-8")


def _damage_yaml(draw: random.Random, folder: Path, seeds: Seeds) -> str:
    import yaml

    path = folder / draw.choice(("recipe.yaml", "train.yaml"))
    kind = draw.random()
    if kind < 0.05:
        return change_file(draw, path)
    if kind < 0.3:
        return change_bytes(draw, path)
    if kind < 0.5:
        text = draw.choice(_BOMBS)
        path.write_text(text, encoding="utf-8")
        return f"{path.name}: {text[:60]!r}"
    if kind < 0.7:
        text = path.read_text(encoding="utf-8")
        place = draw.randrange(len(text))
        path.write_text(text[:place] + draw.choice(_MARKS) + text[place:], encoding="utf-8")
        return f"{path.name}: at {place}"
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    words = change_tree(draw, tree)
    path.write_text(yaml.safe_dump(tree, allow_unicode=False), encoding="utf-8", errors="replace")
    return f"{path.name}: {words}"


_MARKS = (
    "&a ", "*a", "!!python/object/apply:os.system [touch canary]", "? ", "- ", ": ", "|", ">", "%YAML 9\n", "---\n",
    "<<: *a\n", "!!binary ", "!!timestamp ", "0x" + "f" * 5000, "1" * 5000, "1e400", ".nan", "2020-01-01", "1:" * 3000,
    "\t", "\u2028", "{" * 500, "[" * 5000, "0b" + "1" * 5000, "190:20:30",
)  # fmt: skip
_BOMBS = (
    "a: &a [x, x]\nb: &b [*a, *a]\n"
    + "".join(f"c{n}: &c{n} [{', '.join(['*c' + str(n - 1) if n else '*b'] * 9)}]\n" for n in range(12)),
    "a: &a [*a]\nrules: *a\n",
    "rules: " + "[" * 3000 + "]" * 3000,
    "{" * 3000,
    "bits: " + "9" * 5000,
    "bits: 0x" + "f" * 4_000_000,
    "name: !!python/name:os.system\n",
    "- " * 5000,
    "? " * 3000,
    "name: " + "a" * 10_000_000,
    "rules:\n" + "- {match: '" + "*a" * 3000 + "'}\n",
    "rules:\n" + "- {match: '*'}\n" * 20_000,
    "bits: 1:" + "59:" * 4000 + "1\n",
    "steps: 999999999999999999999999\n",
    "bits: 2001-99-99\n",
    "rules: !!set {a, b}\n",
    "<<: [1, 2]\n",
    "rules: 0b" + "1" * 200_000 + "\n",
)


def _steps_yaml(draw: random.Random, folder: Path, seeds: Seeds) -> Sequence[Step]:
    def recipe() -> int:
        from edkm_export.recipe import load_recipe

        def read() -> None:
            found = load_recipe(folder / "recipe.yaml")
            found.plan({"model.embed_tokens": (320, 32), "a.mlp.down_proj": (32, 48)}, "it")

        return _typed(read)

    def settings() -> int:
        from edkm_export.training.train_config import PRESETS, load_config_file

        return _typed(lambda: PRESETS["4bit"].updated(load_config_file(folder / "train.yaml")))

    source = seeds.folder / "source"
    end = command(
        "palettize", source, "--recipe", folder / "recipe.yaml", "-o", folder / "out.pt", "--no-estimate"
    )
    return [recipe, settings, *([end] if draw.random() < 0.3 else [])]


def _typed(read: Callable[[], object]) -> int:
    """The status that the command line would end with."""
    from edkm_export.errors import EdkmExportError

    try:
        read()
    except (EdkmExportError, OSError) as error:
        print(type(error).__name__)
        return 2
    return 0


# JSONL


def _make_jsonl(seeds: Seeds, folder: Path) -> None:
    lines: list[Any] = [
        {"text": "Once upon a time there was a fox."},
        {"instruction": "Say it.", "input": "it", "output": "It."},
        {"instruction": "Add.", "instances": [{"input": "1 1", "output": "2"}, {"input": "", "output": "3"}]},
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _damage_jsonl(draw: random.Random, folder: Path, seeds: Seeds) -> str:
    path = folder / "data.jsonl"
    kind = draw.random()
    if kind < 0.1:
        return change_file(draw, path)
    if kind < 0.3:
        return change_bytes(draw, path)
    lines = path.read_text(encoding="utf-8").splitlines()
    place = draw.randrange(len(lines))
    if kind < 0.4:
        lines[place] = draw.choice(
            ("[" * 100_000, '{"text": ' * 50_000, "9" * 10_000, "NaN", '{"text": "\\ud800"}')
        )
        words = lines[place][:20]
    else:
        tree = json.loads(lines[place])
        words = change_tree(draw, tree)
        lines[place] = json.dumps(tree)
    path.write_text("\n".join(lines), encoding="utf-8")
    return f"line {place}: {words}"


def _steps_jsonl(draw: random.Random, folder: Path, seeds: Seeds) -> Sequence[Step]:
    answers, chat = draw.random() < 0.5, draw.random() < 0.5

    def read() -> None:
        from edkm_export.training.data import read_tokens

        read_tokens([folder / "data.jsonl"], seeds.kept["tokenizer"], answers_only=answers, chat=chat)

    return [lambda: _typed(read)]


READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader("source", _make_source, _damage_source, _steps_source("")),
        Reader("checkpoint", _make_checkpoint, _damage_checkpoint, _steps_checkpoint),
        Reader(
            "coreml",
            _make_export("coreml"),
            _damage_coreml,
            _steps_coreml,
            _needs("coremltools"),
        ),
        Reader(
            "onnx",
            _make_export("onnx"),
            _damage_onnx,
            _steps_onnx,
            _needs("onnx", "onnxruntime"),
        ),
        Reader(
            "coreai",
            _make_export("coreai"),
            _damage_coreai,
            _steps_coreai,
            _needs("coreai", "coreai_torch"),
        ),
        Reader("gguf", _make_gguf, _damage_gguf, _steps_source("model.gguf"), _needs("gguf")),
        Reader("import", _make_import, _damage_import, _steps_import),
        Reader("run", _make_run, _damage_run, _steps_run),
        Reader("yaml", _make_yaml, _damage_yaml, _steps_yaml),
        Reader("jsonl", _make_jsonl, _damage_jsonl, _steps_jsonl),
    )
}


def make_seeds(folder: Path) -> Seeds:
    """Make the sound input of every reader that can be tried here."""
    from tests.helpers.gguf_models import tiny
    from tests.helpers.gguf_writer import content

    seeds = Seeds(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not READERS["gguf"].available():
        seeds.kept["gguf"] = content(tiny("llama"))
    seeds.text.write_text(_TEXT, encoding="utf-8")
    (folder / "train.yaml").write_text(_SETTINGS, encoding="utf-8")
    for reader in READERS.values():
        if not reader.available() and not (folder / reader.name).is_dir():
            (folder / reader.name).mkdir()
            reader.make(seeds, folder / reader.name)
    from edkm_export.reference.source import Source, load_tokenizer

    # compiled and imported here, not in each case
    _run(command("palettize", folder / "source", "-o", folder / "warm.pt", "--no-estimate", "--overwrite"))
    seeds.kept["tokenizer"] = load_tokenizer(Source.parse(folder / "source"))
    seeds.logits["checkpoint"] = _checkpoint_logits(folder / "checkpoint" / "model.pt")
    for name in ("coreml", "onnx", "coreai"):
        if (folder / name).is_dir():
            seeds.logits[name] = _session_logits(folder / name)
    return seeds

"""ONNX profiles in onnxruntime: speed, load time and memory, against float32, float16 and uniform 4 bits.

CHECKPOINT must have int8 or int4 LUTs, so that all profiles hold the same model. Every row is measured in a process
of its own, three times in turn with the others, so that a busy machine is busy for all: the best speed of the three
counts, and the most memory. Keys and values go from call to call without a copy. "float32, fused" is the float32 model
in the operators that `fast` uses besides its products; "uniform 4-bit" needs `pip install onnx-ir`. Memory is resident
memory beyond that of a process with a trivial graph, after generation, without the cache of the text, and after freed
heap is given back to the system; the peak has all of these, and the logits of the prompt. Prompt and text are random
tokens. Last, float32 and `fast` decode in turn in one process, the fairest comparison on a machine whose speed varies;
the median of three such processes counts, since where their weights lie in memory is worth 5%.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

PROMPT, DECODED, REPEATS, ROUNDS = 128, 64, 3, 3
RACES, TURNS = 3, 5  # processes in which two graphs decode, texts of each in turn
ENOUGH_SECONDS = 30  # after which nothing is repeated
FASTER, SMALLER, RESIDENT = 3.0, 0.5, 1.3  # goals: fast against float32, low-memory against its file
FUSED, UNIFORM = "float32, fused", "uniform 4-bit"
ROWS = ("float32", FUSED, "float16", UNIFORM, "exact", "low-memory", "fast")


def make(kind: str, checkpoint_path: Path, folder: Path) -> None:
    """Write the graph of one row."""
    import torch

    from converters.onnx.write import profiles
    from converters.onnx.write.export_plan import plan_onnx
    from converters.onnx.write.graph_file import write_graph
    from edkm_export import checkpoint
    from edkm_export.palette import PalettizedTensor

    dtype, real = (torch.float16, np.float16) if kind == "float16" else (torch.float32, np.float32)

    class DenseForms(profiles.Forms):
        """Decoded weights as they are multiplied, [in, out]."""

        contrib = kind == FUSED

        def _product(self, x: str, tensor: PalettizedTensor) -> str:
            weight = self.graph.weight(
                f"{tensor.name}.transposed",
                real,
                tensor.shape[::-1],
                lambda: tensor.decode().T.contiguous().to(dtype).numpy(),
            )
            return self.graph.node("MatMul", x, weight, name=f"{tensor.name}.product")

        def embedding(self, ids: str, name: str) -> str:
            tensor = self.checkpoint.palettized[self._stored(name)]
            weight = self.graph.weight(
                tensor.name, real, tensor.shape, lambda: tensor.decode().to(dtype).numpy()
            )
            return self.graph.node("Gather", weight, ids)

    loaded = checkpoint.load(checkpoint_path)
    folder.mkdir()
    if kind in profiles.FORMS_OF_PROFILE:
        write_graph(plan_onnx(loaded, runtime=kind), folder)
        return
    profiles.FORMS_OF_PROFILE["dense"] = DenseForms
    model = write_graph(plan_onnx(loaded, runtime="dense", dtype=np.dtype(real).name), folder)
    if kind == UNIFORM:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(onnx.load(model), block_size=32, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        for file in folder.iterdir():
            file.unlink()
        quantizer.model.save_model_to_file(str(model), use_external_data_format=True)


def resident(key: str = "VmRSS") -> int:
    """Resident memory of this process in bytes; with VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def trivial_model() -> bytes:
    """A graph of one product."""
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "one", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return model.SerializeToString()


class Generation:
    """A graph that reads a prompt and decodes the rest of a text.

    Args:
        model: its graph.
        settings: of the session, by the names of genai_config.json.
        threads: of one operation.
    """

    def __init__(self, model: Path, settings: dict[str, Any], threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")  # two may be loaded
        for name, value in settings.items():
            if name.startswith("enable_"):
                setattr(options, name, value)
        self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        outputs = {value.name: value for value in self._session.get_outputs()}
        self._outputs = list(outputs)
        inputs = self._session.get_inputs()
        cache = [value for value in inputs if value.name.startswith("past_key_values.")]
        dtype = np.float16 if "float16" in cache[0].type else np.float32
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._empty = {
            value.name: self._value(np.zeros((1, value.shape[1], 0, value.shape[3]), dtype))
            for value in cache
        }
        self._logits = self._outputs.index("logits")
        self._places = {
            name: self._outputs.index(name.replace("past_key_values", "present")) for name in self._empty
        }
        vocabulary = outputs["logits"].shape[2]
        self._tokens = np.random.default_rng(0).integers(0, vocabulary, (1, PROMPT + DECODED))

    def once(self) -> tuple[float, list[float]]:
        """Seconds for the prompt, and for each decoded token."""
        past, marks = self._empty, [time.perf_counter()]
        for first, count in ((0, PROMPT), *((place, 1) for place in range(PROMPT, PROMPT + DECODED))):
            past = self._step(past, first, count)
            marks.append(time.perf_counter())
        prompt, *tokens = np.diff(marks).tolist()
        return prompt, tokens

    def _step(self, past: dict[str, Any], first: int, count: int) -> dict[str, Any]:
        feeds = {
            "input_ids": self._tokens[:, first : first + count],
            "attention_mask": np.ones((1, first + count), np.int64),
            "position_ids": np.arange(first, first + count)[None],
        }
        given = {name: self._value(value) for name, value in feeds.items()}
        results = self._session.run_with_ort_values(self._outputs, {**given, **past})
        results[self._logits].numpy()
        return {name: results[place] for name, place in self._places.items()}


def run(kind: str, model: Path, threads: int) -> dict[str, Any]:
    """Load a graph and generate."""
    import onnxruntime

    from converters.onnx.write.genai import session_options
    from edkm_export.memory import return_freed_memory, return_large_blocks

    settings = session_options(kind)
    if not settings.get("enable_cpu_mem_arena", True):  # as `edkm-export generate` does
        return_large_blocks()
    onnxruntime.InferenceSession(trivial_model())  # so that the library itself is in memory
    return_freed_memory()
    before, start = resident(), time.perf_counter()
    generation = Generation(model, settings, threads)
    load_seconds, load_peak = time.perf_counter() - start, resident("VmHWM") - before
    return_freed_memory()
    found, begin = [], time.perf_counter()
    while not found or (len(found) < REPEATS and time.perf_counter() - begin < ENOUGH_SECONDS):
        found.append(generation.once())
    peak = resident("VmHWM") - before
    return_freed_memory()
    return {
        "prefill": max(PROMPT / prompt for prompt, _ in found),
        "decode": max(DECODED / sum(tokens) for _, tokens in found),
        "load_seconds": load_seconds,
        "load_peak": load_peak,
        "peak": peak,
        "resident": resident() - before,
    }


def race(first: Path, second: Path, threads: int) -> float:
    """How many times as fast the second graph decodes as the first: medians of texts in turn, in one process."""
    runners = [Generation(model, {}, threads) for model in (first, second)]
    seconds: list[list[float]] = [[], []]
    for _ in range(TURNS):
        for runner, found in zip(runners, seconds, strict=True):
            found += runner.once()[1]
    slow, fast = (statistics.median(found) for found in seconds)
    return slow / fast


def fresh(*arguments: str) -> str:
    """Call this script in a process of its own; what it prints last."""
    command = [sys.executable, "-m", "benchmarks.onnx_runtime", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]


@click.command(help=__doc__)
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(ROWS), help="Rows to measure; by default all.")
@click.option("--make", "making", hidden=True)
@click.option("--run", "running", hidden=True)
@click.option("--folder", hidden=True, type=click.Path(path_type=Path))
@click.option("--against", hidden=True, type=click.Path(path_type=Path))
def main(
    checkpoint: Path,
    threads: int,
    only: tuple[str, ...],
    making: str | None,
    running: str | None,
    folder: Path | None,
    against: Path | None,
) -> None:
    if making is not None and folder is not None:
        make(making, checkpoint, folder)
        print(sum(path.stat().st_size for path in folder.iterdir()))
        return
    if against is not None and folder is not None:
        print(race(against / "model.onnx", folder / "model.onnx", threads))
        return
    if running is not None and folder is not None:
        print(json.dumps(run(running, folder / "model.onnx", threads)))
        return
    kinds = only or ROWS
    if UNIFORM in kinds and importlib.util.find_spec("onnx_ir") is None:
        raise click.UsageError(
            f"the row {UNIFORM!r} needs `pip install onnx-ir`; or choose others with --only."
        )
    with tempfile.TemporaryDirectory() as temporary:
        places = {kind: str(Path(temporary) / kind.replace(" ", "-")) for kind in kinds}
        sizes = {
            kind: int(fresh(str(checkpoint), "--make", kind, "--folder", places[kind])) for kind in kinds
        }
        measured: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for _ in range(ROUNDS):
            for kind in kinds:
                given = ("--run", kind, "--folder", places[kind], "--threads", str(threads))
                measured[kind].append(json.loads(fresh(str(checkpoint), *given)))
                print(f"{kind}: {measured[kind][-1]['decode']:.1f} tokens/s", file=sys.stderr, flush=True)
        faster = 0.0
        if {"fast", "float32"} <= set(kinds):
            given = ("--folder", places["fast"], "--against", places["float32"], "--threads", str(threads))
            races = [float(fresh(str(checkpoint), *given)) for _ in range(RACES)]
            faster = statistics.median(races)
            print(
                f"fast against float32 in turn: {', '.join(f'{race:.2f}' for race in races)}", file=sys.stderr
            )
    print(f"prompt of {PROMPT} tokens, {DECODED} decoded, {threads} threads, best of {ROUNDS} x {REPEATS}")
    print(
        "| | file MB | load s | load peak MB | peak MB | resident MB | prefill tokens/s | decode tokens/s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    found = {}
    for kind, rounds in measured.items():
        row = {
            key: (min if key == "load_seconds" else max)(each[key] for each in rounds) for key in rounds[0]
        }
        found[kind] = {**row, "size": sizes[kind]}
        print(
            f"| {kind} | {sizes[kind] / 1e6:.1f} | {row['load_seconds']:.1f} | {row['load_peak'] / 1e6:.0f} "
            f"| {row['peak'] / 1e6:.0f} | {row['resident'] / 1e6:.0f} | {row['prefill']:.0f} | {row['decode']:.1f} |"
        )
    if {"fast", "float32"} <= found.keys():
        fast, base = found["fast"], found["float32"]
        print(
            f"fast decodes {fast['decode'] / base['decode']:.2f} times as fast as float32 by this table, {faster:.2f} "
            f"times by the medians of {TURNS} texts each in turn, the median of {RACES} processes (goal {FASTER:g}),"
        )
        print(f"in {fast['resident'] / base['resident']:.2f} of its memory (goal {SMALLER:g})")
    if "low-memory" in found:
        low = found["low-memory"]
        print(f"low-memory resides in {low['resident'] / low['size']:.3f} times its file (goal {RESIDENT:g})")


if __name__ == "__main__":
    main()

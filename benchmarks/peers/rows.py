"""The rows of `quality_peers`: which program runs, in which environment, and why it could not."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

from benchmarks.peers.judging import Result
from edkm_export import checkpoint
from edkm_export.errors import BackendMissingError
from edkm_export.reference import llamacpp
from edkm_export.reference.llamacpp_unpacking import libraries

_HERE = Path(__file__).parent
_LAST = 300  # characters of an error that a table has room for


class NotRun(Exception):
    """A row that could not be run, and why."""


@dataclass(frozen=True)
class Setting:
    """What all rows are given.

    Attributes:
        reference: the model, as the user names it.
        model: folder with its float32 weights.
        text: calibration text.
        windows, training_windows: files with its tokens, the latter for rows that train.
        device: "cpu" or "cuda".
        seed: of every row.
        work: folder for what rows write.
        pythons: {peer: interpreter of its environment}.
        deadline_s: of a row.
    """

    reference: str
    model: Path
    text: Path
    windows: Path
    training_windows: Path
    device: str
    seed: int
    work: Path
    pythons: Mapping[str, str]
    deadline_s: float


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: as printed.
        peer: whose environment it needs; "ours" is this one.
        bits: nominal.
        program: module beside this file; empty for ours.
        extra: what its program is told beside the task.
        arguments: of our command line, for ours.
        trains: for given minutes, on the longer text.
    """

    name: str
    peer: str
    bits: int
    program: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)
    arguments: Sequence[str] = ()
    trains: bool = False

    def run(self, setting: Setting, minutes: float) -> tuple[Result, float]:
        """Run it in a process of its own: its weights, and the seconds that it took.

        Raises:
            NotRun: its environment is not given, it failed, or it met its deadline.
        """
        folder = setting.work / f"{self.name}-{self.bits}".replace(" ", "-").replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        words = (
            self._own(setting, folder, minutes) if not self.program else self._peer(setting, folder, minutes)
        )
        log, began = folder / "log.txt", time.monotonic()
        deadline = setting.deadline_s + (60 * minutes if self.trains else 0)
        with log.open("w") as output:
            try:
                done = subprocess.run(
                    words, stdout=output, stderr=subprocess.STDOUT, timeout=deadline, check=False
                )
            except subprocess.TimeoutExpired as error:
                raise NotRun(f"not done within {deadline / 60:.0f} minutes") from error
            except OSError as error:
                raise NotRun(f"{words[0]}: {error.strerror}") from error
        seconds = time.monotonic() - began
        if done.returncode:
            said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise NotRun(f"status {done.returncode}: {(said or ['nothing was said'])[-1][:_LAST]}")
        if not self.program:
            made = checkpoint.load(folder / "run" / "model.pt" if self.trains else folder / "model.pt")
            return Result.of_checkpoint(made, " ".join(self.arguments)), seconds
        record = json.loads((folder / "row.json").read_text())
        weights = load_file(folder / "weights.safetensors")
        return Result(weights, record["bits"], record["settings"], record["versions"]), seconds

    def _own(self, setting: Setting, folder: Path, minutes: float) -> list[str]:
        words = [
            sys.executable,
            "-m",
            "edkm_export",
            self.arguments[0],
            setting.reference,
            *self.arguments[1:],
        ]
        if self.trains:
            return [
                *words, "--data", str(setting.text), "--minutes", f"{minutes:g}", "--device", setting.device,
                "--seed", str(setting.seed), "-o", str(folder / "run"), "--overwrite",
            ]  # fmt: skip
        if "high" in self.arguments:
            words += ["--device", setting.device]
        return [
            *words, "--calibration", str(setting.text), "--no-estimate", "-o", str(folder / "model.pt"), "--overwrite"
        ]  # fmt: skip

    def _peer(self, setting: Setting, folder: Path, minutes: float) -> list[str]:
        python = setting.pythons.get(self.peer)
        if python is None:
            raise NotRun(f"no environment is given: --peer {self.peer}=PYTHON")
        extra = dict(self.extra)
        if self.peer == "llamacpp":
            package = llamacpp.available()
            if package is None:
                raise NotRun(f"llama.cpp is not there: {llamacpp.INSTALL}")
            try:
                extra |= {"libraries": str(libraries(package)), "version": llamacpp.version()}
            except BackendMissingError as error:
                raise NotRun(str(error)) from error
        task = {
            "model": str(setting.model),
            "text": str(setting.text),
            "windows": str(setting.training_windows if self.trains else setting.windows),
            "bits": self.bits,
            "device": setting.device,
            "minutes": minutes,
            "seed": setting.seed,
            "output": str(folder),
            "extra": extra,
        }
        (folder / "task.json").write_text(json.dumps(task))
        return [python, str(_HERE / f"{self.program}.py"), str(folder / "task.json")]


_LLAMA = {4: ("Q4_K", "IQ4_XS"), 3: ("Q3_K", "IQ3_S", "IQ3_XXS"), 2: ("Q2_K", "IQ2_S", "IQ2_XS")}


def rows_of(bits: int) -> list[Row]:
    """All rows of a number of bits; those that train come last, for the slowest of the others sets their minutes."""
    rows = [
        Row("AutoRound", "autoround", bits, "autoround"),
        Row("coremltools k-means", "coremltools", bits, "coremltools_kmeans", {"kind": "plain"}),
        Row("coremltools sensitive k-means", "coremltools", bits, "coremltools_kmeans", {"kind": "sensitive"}),
        Row("coreai-opt sensitive k-means", "coreai-opt", bits, "coreai_opt_kmeans"),
        Row("GPTQ (llm-compressor)", "gptq", bits, "gptq"),
        *(Row(f"llama.cpp {kind}", "llamacpp", bits, "llamacpp_quants", {"type": kind}) for kind in _LLAMA[bits]),
        Row("mlx-lm DWQ", "mlx", bits, "mlx_dwq"),
        Row("ours, one shot", "ours", bits, arguments=("palettize", "--bits", str(bits))),
        Row("ours, --effort high", "ours", bits, arguments=("palettize", "--bits", str(bits), "--effort", "high")),
        Row("torchao QAT", "torchao", bits, "torchao_qat", trains=True),
        Row("ours, trained", "ours", bits, arguments=("train", "--preset", f"{bits}bit"), trains=True),
    ]  # fmt: skip
    return rows

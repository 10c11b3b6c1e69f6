"""Settings of a training run, and the presets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic

from edkm_export.errors import InputError
from edkm_export.lut_grid import LutDtype, check_bits
from edkm_export.regular_file import read_regular
from edkm_export.training.bit_budget import BitTarget
from edkm_export.training.palettized.clusters import Backward
from edkm_export.yaml_text import YamlError, load_yaml

__all__ = ["PRESETS", "OnResume", "TrainConfig", "load_config_file"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class OnResume:
    """What a run that goes on may do with a setting."""

    may_change: bool


Kept = Annotated[_T, OnResume(may_change=False)]
Free = Annotated[_T, OnResume(may_change=True)]


_STRICT = {
    "target_bits": "strict_target",
    "target_decoder_bits": "strict_target",
    "group_size": "strict_groups",
}
_TARGETS = ("target_bits", "target_decoder_bits")


class TrainConfig(pydantic.BaseModel):
    """Settings of a run. Learning rates are shares of a tensor's root mean square, the same for every model.

    `Kept` ones decide the result, and a run that goes on has to have them as it was started; `Free` ones may change.

    Attributes:
        bits: bits of an index in the decoder's linear layers; with a target the least. Embedding and output head take
            8, with `target_bits` what it leaves them.
        group_size: output rows that share a LUT; 0: one LUT a weight.
        lut_dtype: grid of the LUT entries. "int4" takes at most 3 `bits`; layers that get more by `target_bits`, and
            embedding and output head, are on an int8 grid.
        target_bits: average over all weights, everything that is stored included, that layers of more bits, embedding
            and output head among them, may fill up, the most sensitive first.
        target_decoder_bits: average over the decoder's weights alone, LUTs included, likewise. At most one of these
            two; both None: all layers take `bits`.
        strict_target, strict_groups: refuse a target that is below what `bits` take with their LUTs, or a
            `group_size` that does not divide a layer's rows; otherwise the run comes as near as the model allows, as
            presets do. What the user set is strict. Of no effect on a run that goes on.
        backward, alpha, iterations: see `ClusterMethod`.
        objective: "distillation" from the frozen original, or "cross-entropy" on the data.
        temperature: of the distillation.
        importance: what weighs the seeds: "fisher" (input energy times output gradient), "energy" or "none".
        fold_scales: move activation outliers from the norms' outputs into the weights before clustering.
        train_embedding: train embedding and output head too; otherwise they stay at their one-shot clusters. None:
            those that have less than `bit_budget.TRAINED_BELOW` bits.
        train_norms: train norms and biases.
        refit_every: steps between moves of all centroids to the mean of their weights; 0: never.
        steps, tokens, minutes: how long to train; the first that is reached ends it. All None: one pass over
            the data. With `minutes` the schedule follows the clock, and no two runs are the same.
        context: tokens of a window.
        batch_size: windows of a micro-batch.
        accumulate: micro-batches of an optimizer step.
        weight_rate, lut_rate, norm_rate: learning rates.
        warmup: share of the run in which the rates rise.
        decay: shape of their fall.
        final_rate: share of the rates that is left at the end.
        clip: largest norm of the gradient; 0: do not clip.
        bf16: products in bfloat16.
        moments: what the optimizer's moments of weights take: "float32", "bfloat16", or "8bit" with a scale for 256.
        masters: "float32", or "bfloat16", with gradients in it, too, and rounded stochastically when they are stepped;
            of straight-through gradients in a single process only.
        gradient_checkpointing: recompute activations in the backward pass.
        record_steps: on CUDA, launch steps as a recorded CUDA graph where the model allows it (`graphs.can_record`).
        self_generated: tokens that the original writes itself, added to the data.
        seed: of data order and sampling.
        answers_only: learn only the answers of instructions and conversations.
        chat: write instructions in the model's chat template.
        calibration_tokens: for importance, sensitivity and scales.
        eval_tokens: of each evaluation text.
        eval_every, log_every, save_every: in steps; 0: no evaluations or checkpoints on the way.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    bits: Kept[Literal[1, 2, 3, 4, 6, 8]] = 4
    group_size: Kept[int] = pydantic.Field(default=16, ge=0)
    lut_dtype: Kept[LutDtype] = "float16"
    target_bits: Kept[float | None] = pydantic.Field(default=None, gt=0, le=8.5)
    target_decoder_bits: Kept[float | None] = pydantic.Field(default=None, gt=0, le=8.5)
    strict_target: Free[bool] = True
    strict_groups: Free[bool] = True
    backward: Kept[Backward] = "straight-through"
    alpha: Kept[float] = pydantic.Field(default=1.0, gt=0)
    iterations: Kept[int] = pydantic.Field(default=1, ge=1, le=50)
    objective: Kept[Literal["distillation", "cross-entropy"]] = "distillation"
    temperature: Kept[float] = pydantic.Field(default=1.0, gt=0)
    importance: Kept[Literal["fisher", "energy", "none"]] = "fisher"
    fold_scales: Kept[bool] = False
    train_embedding: Kept[bool | None] = None
    train_norms: Kept[bool] = True
    refit_every: Kept[int] = pydantic.Field(default=0, ge=0)
    steps: Kept[int | None] = pydantic.Field(default=None, ge=1)
    tokens: Kept[int | None] = pydantic.Field(default=None, ge=1)
    minutes: Free[float | None] = pydantic.Field(default=None, gt=0)
    context: Kept[int] = pydantic.Field(default=512, ge=2)
    batch_size: Kept[int] = pydantic.Field(default=4, ge=1)
    accumulate: Kept[int] = pydantic.Field(default=1, ge=1)
    weight_rate: Kept[float] = pydantic.Field(default=1e-3, ge=0)
    lut_rate: Kept[float] = pydantic.Field(default=3e-3, ge=0)
    norm_rate: Kept[float] = pydantic.Field(default=2e-3, ge=0)
    warmup: Kept[float] = pydantic.Field(default=0.03, ge=0, lt=1)
    decay: Kept[Literal["linear", "cosine", "none"]] = "linear"
    final_rate: Kept[float] = pydantic.Field(default=0.02, ge=0, le=1)
    clip: Kept[float] = pydantic.Field(default=1.0, ge=0)
    bf16: Kept[bool] = False
    moments: Kept[Literal["float32", "bfloat16", "8bit"]] = "float32"
    masters: Kept[Literal["float32", "bfloat16"]] = "float32"
    gradient_checkpointing: Free[bool] = False
    record_steps: Kept[bool] = True
    self_generated: Kept[int] = pydantic.Field(default=0, ge=0)
    seed: Kept[int] = pydantic.Field(default=0, ge=0, lt=2**31)
    answers_only: Kept[bool] = False
    chat: Kept[bool] = False
    calibration_tokens: Kept[int] = pydantic.Field(default=4096, ge=2)
    eval_tokens: Free[int] = pydantic.Field(default=4096, ge=2)
    eval_every: Free[int] = pydantic.Field(default=0, ge=0)
    log_every: Free[int] = pydantic.Field(default=10, ge=1)
    save_every: Free[int] = pydantic.Field(default=200, ge=0)

    @pydantic.field_validator("lut_dtype")
    @classmethod
    def _chooses(cls, lut_dtype: LutDtype, info: pydantic.ValidationInfo) -> LutDtype:
        check_bits(lut_dtype, info.data.get("bits", 0))  # bits that are wrong have their own message
        return lut_dtype

    @pydantic.field_validator("masters")
    @classmethod
    def _steps_straight(cls, masters: str, info: pydantic.ValidationInfo) -> str:
        if masters == "bfloat16" and info.data.get("backward") != "straight-through":
            raise ValueError("bfloat16 masters take backward straight-through; soft k-means needs float32")
        return masters

    @pydantic.field_validator("target_decoder_bits")
    @classmethod
    def _one_target(cls, bits: float | None, info: pydantic.ValidationInfo) -> float | None:
        if bits is not None and info.data.get("target_bits") is not None:
            raise ValueError(
                "target_bits is over all weights and this one over the decoder; give one of them"
            )
        return bits

    @property
    def target(self) -> BitTarget | None:
        """The average that bits are chosen for; None: all layers take `bits`."""
        if self.target_bits is not None:
            return BitTarget(self.target_bits, whole=True)
        if self.target_decoder_bits is not None:
            return BitTarget(self.target_decoder_bits, whole=False)
        return None

    @property
    def step_windows(self) -> int:
        """Windows of an optimizer step."""
        return self.batch_size * self.accumulate

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.step_windows * self.context

    def updated(self, changes: dict[str, Any]) -> TrainConfig:
        """These settings with some changed; a target or a group size among them is strict from then on.

        A target takes the place of the one that was there.

        Raises:
            InputError: naming the setting that is unknown or wrong.
        """
        strict = {mark: True for name, mark in _STRICT.items() if name in changes}
        replaced = dict.fromkeys(_TARGETS) if any(changes.get(name) is not None for name in _TARGETS) else {}
        return self.parse({**self.model_dump(), **strict, **replaced, **changes})

    @classmethod
    def parse(cls, settings: Any) -> TrainConfig:
        """Settings by name; those that are missing have their defaults.

        Raises:
            InputError: naming the setting that is unknown or wrong.
        """
        try:
            return cls.model_validate(settings)
        except pydantic.ValidationError as error:
            lines = [
                f"{'.'.join(map(str, detail['loc'])) or 'settings'}: {detail['msg'].removeprefix('Value error, ')} "
                f"(found {detail.get('input')!r})"
                for detail in error.errors()
            ]
            raise InputError("; ".join(lines)[:600] + ".") from error

    @classmethod
    def may_change(cls, name: str) -> bool:
        """Whether a run may go on with another value of a setting."""
        (mark,) = (each for each in cls.model_fields[name].metadata if isinstance(each, OnResume))
        return mark.may_change

    def conflicts(self, started: TrainConfig) -> Iterator[str]:
        """Settings that keep a run which was started otherwise from going on with these."""
        for name in type(self).model_fields:
            if not self.may_change(name) and getattr(self, name) != getattr(started, name):
                yield name


_SETTINGS: dict[str, dict[str, Any]] = {
    "4bit": {"bits": 4, "target_decoder_bits": 4.1, "weight_rate": 1e-3, "lut_rate": 1e-3},
    "3bit": {"bits": 3, "target_decoder_bits": 3.25, "weight_rate": 2e-3, "lut_rate": 2e-3},
    "2bit": {"bits": 2, "target_decoder_bits": 2.3, "weight_rate": 4e-3, "lut_rate": 3e-3},
    "paper": {
        "bits": 3,
        "group_size": 0,
        "backward": "dkm",
        "iterations": 3,
        "importance": "none",
        "train_embedding": True,
    },
}

PRESETS: dict[str, TrainConfig] = {
    name: TrainConfig(**settings, strict_target=False, strict_groups=False)
    for name, settings in _SETTINGS.items()
}
"""`paper` is eDKM as published (arXiv 2309.00964): 3 bits, one LUT a weight, soft DKM in both passes."""


def load_config_file(path: str | Path) -> dict[str, Any]:
    """Settings of a YAML file, unchecked.

    Raises:
        InputError: it cannot be read, or is not a mapping.
    """
    path = Path(path)
    try:
        contents = load_yaml(read_regular(path).decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    except (YamlError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not valid YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(contents, dict):
        raise InputError(f"{path}: expected settings as `name: value` lines.")
    return contents

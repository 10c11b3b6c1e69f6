"""`--effort high` of one-shot palettization: layers are fitted to what the float ones make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edkm_export.api.calibration_data import CalibrationInput
from edkm_export.errors import InputError
from edkm_export.palettization import palettize_ends
from edkm_export.recipe import Rule
from edkm_export.training.block_fit import FitSettings
from edkm_export.training.reconstruction import (
    Reconstruction,
    check_layers,
    layers_of,
    windows_in_streams,
)

__all__ = ["Effort"]

_SETTINGS = {"cuda": FitSettings(steps=100, batch=8), "cpu": FitSettings(steps=48, batch=4)}
_TOKENS = {"cuda": 1 << 16, "cpu": 1 << 15}


@dataclass(frozen=True)
class Effort:
    """Where layers are fitted, and how.

    Attributes:
        device: "cuda" or "cpu".
        settings: of the fit.
    """

    device: str
    settings: FitSettings

    memory_bytes = 1 << 30
    """What it takes beside what palettization takes anyway: streams of hidden states, and a layer in the optimizer."""

    @classmethod
    def of(cls, level: str, *, device: str | None = None, steps: int | None = None) -> Effort | None:
        """The settings of a level; None for "normal", in which nothing is fitted.

        Args:
            level: "normal" or "high".
            device: "cuda" or "cpu"; None: CUDA if there is one.
            steps: of each layer's fit; None: as many as suit the device.

        Raises:
            InputError: an unknown level, a device that is not there, or settings of "high" with "normal".
        """
        if level not in ("normal", "high"):
            raise InputError(f"effort: is {level!r}, expected 'normal' or 'high'.")
        if level == "normal":
            if device is not None or steps is not None:
                raise InputError(
                    "device and steps are for effort high; leave them out, or add --effort high."
                )
            return None
        if device not in (None, "cpu", "cuda"):
            raise InputError(f"device: is {device!r}, expected 'cpu' or 'cuda'.")
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("device cuda: torch finds no CUDA device here.")
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        settings = _SETTINGS[chosen]
        return cls(chosen, settings if steps is None else settings.with_steps(steps))

    @property
    def tokens(self) -> int:
        """Of the calibration text, by default."""
        return _TOKENS[self.device]

    def check(
        self, outline: Any, calibration: CalibrationInput | None, *, is_embedding: bool, source: str
    ) -> None:
        """Refuse what cannot be fitted, before weights are read.

        Raises:
            InputError: there is no calibration text, or the model has no stack of layers that take hidden states alone.
        """
        if calibration is None:
            raise InputError(
                "effort high fits layers to what they make of a text, and there is none; give a calibration text "
                "(--calibration FILE, in Python calibration=), or leave the effort out."
            )
        if is_embedding:
            raise InputError(f"effort high is for language models, and {source} is an embedding model.")
        check_layers(layers_of(outline), source)

    def windows(self, outline: Any, windows: Tensor, name: str) -> Tensor:
        """Windows [windows, context] that there is room for, two at least.

        Raises:
            InputError: the text gives one only.
        """
        if len(windows) < 2:
            raise InputError(
                f"{name}: has {windows.numel()} tokens to calibrate on, and effort high needs two windows of "
                f"{windows.shape[1]} at least, one of which shows whether fitting helped; give a longer text."
            )
        return windows_in_streams(outline, windows)

    def reconstruct(
        self,
        model: Any,
        rules: Mapping[str, Rule],
        windows: Tensor,
        *,
        vocabulary: Mapping[str, Tensor] | None,
        consume: bool,
        source: str,
        advance: Callable[[str, int], None],
    ) -> Reconstruction:
        """Palettize and fit the decoder layers; see `Reconstruction`, and `palettize_model` about the vocabulary."""
        ends = palettize_ends(model, rules, vocabulary or {}, windows.numel(), source, advance)
        made = Reconstruction(
            model,
            rules,
            self.settings,
            device=self.device,
            consume=consume,
            source=source,
            advance=advance,
            ends=ends,
        )
        made.run(windows)
        return made

    def record(self, made: Reconstruction) -> dict[str, Any]:
        """For the provenance: settings, and of each layer the loss with compensation alone and after fitting."""
        settings = self.settings
        return {
            "device": self.device,
            "steps": settings.steps,
            "windows_a_step": settings.batch,
            "errors_weighed_by": settings.weighs,
            "norms": settings.norms,
            "layers": {
                each.name: [float(f"{value:.4g}") for value in (each.before, each.after)]
                for each in made.fitted
            },
        }

"""`edkm_export.palettize`: a model, a module or one weight as lookup tables and indices."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from edkm_export.api.calibration_data import as_batches, read_calibration, takes_ids
from edkm_export.api.effort import Effort
from edkm_export.api.one_shot import CALIBRATION_TOKENS, palettize_language_model
from edkm_export.api.recipes import DEFAULT_BITS, GivenRecipe, choose_recipe, fitted_recipe
from edkm_export.api.subjects import MemorySubject, SourceSubject, Subject
from edkm_export.array_input import as_tensor
from edkm_export.calibration import Batch, module_energy
from edkm_export.checkpoint import Checkpoint
from edkm_export.compensated_weight import makes_up, palettize_compensated
from edkm_export.decoder.build import FAMILIES
from edkm_export.errors import InputError, RecipeError
from edkm_export.lut_dtypes import LutDtype
from edkm_export.memory_budget import MemoryBudget
from edkm_export.palette import PalettizedTensor
from edkm_export.palettization import palettizable_shapes, palettize_model, palettize_weight
from edkm_export.prompt import read_tokenizer
from edkm_export.recipe import Recipe
from edkm_export.reference import source as sources
from edkm_export.reference.memory_model import is_causal_lm, portable, require_plain
from edkm_export.training.bit_budget import LEAST_BITS, BitTarget
from edkm_export.versions import library_versions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["palettize"]

_COMMAND = ["edkm_export.palettize"]
_HELD_OUT = 512  # tokens that an estimate holds out, behind those of the calibration


@overload
def palettize(
    model: Tensor | NDArray[np.floating[Any]],
    *,
    calibration: Any = None,
    bits: int | None = None,
    group_size: int | None = None,
    lut_dtype: LutDtype | None = None,
    name: str = "weight",
) -> PalettizedTensor: ...


@overload
def palettize(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    calibration: Any = None,
    bits: int | None = None,
    group_size: int | None = None,
    lut_dtype: LutDtype | None = None,
    recipe: GivenRecipe | None = None,
    target_bits: float | None = None,
    target_decoder_bits: float | None = None,
    skip: Iterable[str] = (),
    calibration_tokens: int | None = None,
    effort: Literal["normal", "high"] = "normal",
    device: str | None = None,
    estimate: bool = False,
    adapter: str | Path | None = None,
) -> Checkpoint: ...


def palettize(
    model: str | Path | nn.Module | Tensor | NDArray[np.floating[Any]],
    tokenizer: Any = None,
    *,
    calibration: Any = None,
    bits: int | None = None,
    group_size: int | None = None,
    lut_dtype: LutDtype | None = None,
    recipe: GivenRecipe | None = None,
    target_bits: float | None = None,
    target_decoder_bits: float | None = None,
    skip: Iterable[str] = (),
    calibration_tokens: int | None = None,
    effort: Literal["normal", "high"] = "normal",
    device: str | None = None,
    estimate: bool = False,
    adapter: str | Path | None = None,
    name: str = "weight",
) -> Checkpoint | PalettizedTensor:
    """Cluster weights into lookup tables, in one shot.

    Args:
        model: a language model: a Hugging Face folder, hub id or GGUF file, or a model of transformers in memory, which
            is left as it is. Or an embedding model: a folder of sentence-transformers. Or any other `torch.nn.Module`,
            whose linear, embedding and convolution layers are palettized. Or one weight, float [out, in] or
            [out, in, *kernel].
        tokenizer: of transformers, or a folder with one; for a model in memory. A path brings its own.
        calibration: what decides which errors matter; recommended, it is worth about a bit. For a language model: the
            path of a text file, strings, a dataset with a "text" or "input_ids" column, or token ids; each linear layer
            then makes up for its errors and those of the layers before it. For a weight: inputs of its layer, float
            [..., in], likewise. For other modules: example inputs, which weigh the clustering: a tensor, a tuple, a
            dict of named inputs, or several of these.
        bits: of an index: 1, 2, 3, 4, 6 or 8; default 4. Embeddings and output heads of language models get 8.
        group_size: output rows that share a LUT, 0: all of them; default 16, or the nearest number that divides the
            rows.
        lut_dtype: "float16" (default), "int8", or "int4" for up to 3 bits.
        recipe: instead of these three: a `Recipe`, a preset ("4bit"), a YAML file, or its contents.
        target_bits: of a language model, with a calibration: average bits over all weights, with everything that is
            stored. Bits are chosen weight by weight where they lower the loss most, from `bits` (then 2 by default) or
            those of the recipe on; embedding and output head take part, from 2 to 8 bits.
        target_decoder_bits: likewise over the weights of the decoder alone, while embedding and output head keep 8.
        skip: shell patterns of module names that stay dense, such as "*.classifier"; for modules that are no language
            models.
        calibration_tokens: of the text to use; default 4,096, with effort "high" 65,536 on CUDA and 32,768 on the CPU.
        effort: "high" fits each decoder layer of a language model to what the float layer makes of the calibration
            text, in minutes on a GPU.
        device: where that is done, "cpu" or "cuda"; default CUDA if there is one.
        estimate: compare a language model with the original on text that calibration did not see, in seconds; the
            result is in `provenance["estimate"]`.
        adapter: folder of a LoRA adapter that is merged into a model that a path names.
        name: of one weight.

    Returns:
        A `Checkpoint`; of one weight a `PalettizedTensor`.

    Raises:
        InputError: the model, tokenizer or calibration cannot be used: of another type, NaN in a weight, no ids.
        RecipeError, PaletteError: bits that no target holds, such as 5; a group size that does not divide.
        ConversionError: a path names a model of a family that cannot be exported.
        BackendMissingError: a package that reads this form is not installed.

    Example:
        >>> checkpoint = edkm_export.palettize("fixtures/tiny-llama", calibration=["Once upon a time, ..."])
        >>> checkpoint.save("model.pt")
    """
    options = (bits, group_size, lut_dtype)
    chosen_effort = Effort.of(effort, device=device)
    tokens = calibration_tokens or (CALIBRATION_TOKENS if chosen_effort is None else chosen_effort.tokens)
    target = _target(target_bits, target_decoder_bits)
    least = DEFAULT_BITS if target is None else LEAST_BITS
    if isinstance(model, (str, Path)):
        _only_for_modules(skip)
        given = None if tokenizer is None else _as_tokenizer(tokenizer)
        subject: Subject = SourceSubject(sources.Source.parse(model, adapter).locate(), given)
        if estimate and subject.embedding() is not None:
            raise InputError("estimate: is for language models; `verify` measures an embedding model.")
        plan = choose_recipe(recipe, *options, default_bits=least)
        return _of_subject(subject, plan, calibration, tokens, estimate, target, chosen_effort)
    if adapter is not None:
        raise InputError(
            "adapter: is merged into a model that a path names; merge it in memory: merge_and_unload()."
        )
    if isinstance(model, nn.Module):
        if is_causal_lm(model) and _family(model) in FAMILIES:
            _only_for_modules(skip)
            given = None if tokenizer is None else _as_tokenizer(tokenizer)
            subject = MemorySubject(model, given)
            plan = choose_recipe(recipe, *options, default_bits=least)
            return _of_subject(subject, plan, calibration, tokens, estimate, target, chosen_effort)
        if estimate or target is not None:
            asked = "estimate" if target is None else target.option
            raise InputError(f"{asked}: is for language models.")
        if chosen_effort is not None:
            raise InputError("effort high: is for language models of the families that can be exported.")
        chosen = choose_recipe(recipe, *options) if recipe is not None else None
        return _of_module(model, tokenizer, chosen, options, tuple(skip), calibration, tokens)
    if isinstance(model, Tensor) or hasattr(model, "__array__"):
        if any(
            (recipe is not None, target is not None, tokenizer is not None, skip, chosen_effort is not None)
        ):
            raise InputError(
                "model: is one weight, which takes neither recipe, target, tokenizer, skip nor effort."
            )
        return _of_weight(as_tensor(model, name), name, options, calibration)
    raise InputError(
        f"model: is {type(model).__name__}, expected a path or hub id, a torch.nn.Module or a tensor."
    )


def _target(whole: float | None, decoder: float | None) -> BitTarget | None:
    """The average that was asked for."""
    if whole is not None and decoder is not None:
        raise InputError(
            "target_bits is over all weights and target_decoder_bits over the decoder; give one of them."
        )
    bits = decoder if whole is None else whole
    if bits is None:
        return None
    if not isinstance(bits, (int, float)) or not 0 < bits <= 16:
        raise InputError(f"target_bits: is {bits!r}, expected bits a weight, above 0.")
    return BitTarget(float(bits), whole=whole is not None)


def _family(model: Any) -> str:
    return str(model.config.model_type)


def _only_for_modules(skip: Iterable[str]) -> None:
    if tuple(skip):
        raise RecipeError(
            "skip: is for modules that are no language models; give a recipe with rules that say skip: true."
        )


def _of_subject(
    subject: Subject,
    plan: Recipe,
    calibration: Any,
    tokens: int,
    estimate: bool,
    target: BitTarget | None,
    effort: Effort | None,
) -> Checkpoint:
    """A language model."""
    read = None if calibration is None else read_calibration(calibration, tokens + _HELD_OUT)
    return palettize_language_model(
        subject,
        plan,
        calibration=read,
        calibration_tokens=tokens,
        estimate=estimate,
        command=_COMMAND,
        target=target,
        memory=MemoryBudget.of(None),
        effort=effort,
    ).checkpoint


def _of_module(
    module: nn.Module,
    tokenizer: Any,
    recipe: Recipe | None,
    options: tuple[int | None, int | None, LutDtype | None],
    skip: tuple[str, ...],
    calibration: Any,
    tokens: int,
) -> Checkpoint:
    """Any module: its parameters and floating-point buffers."""
    where = type(module).__name__
    require_plain(module, where)
    shapes = palettizable_shapes(module)
    if not shapes:
        raise InputError(
            f"{where}: has no linear, embedding or convolution layer, so nothing can be palettized."
        )
    if recipe is not None and skip:
        raise RecipeError("recipe decides what stays dense (skip: true); leave skip out.")
    plan = fitted_recipe(shapes, *options, skip) if recipe is None else recipe
    plan.plan(shapes, where)
    provenance = _provenance(where)
    energy = None
    if calibration is not None:
        if tokenizer is not None or (takes_ids(module) and not _is_batches(calibration)):
            read = read_calibration(calibration, tokens)
            windows = read.windows(None if tokenizer is None else _as_tokenizer(tokenizer), tokens)
            provenance["calibration"] = read.provenance(windows)
            place = next(module.parameters()).device
            batches: Iterable[Batch] = [((), {"input_ids": window[None].to(place)}) for window in windows]
        else:
            batches = as_batches(calibration, module)
        energy = module_energy(module, batches)
    parts = palettize_model(module, plan, energy=energy, source=where, consume=False)
    config = getattr(module, "config", None)
    return Checkpoint(
        config=portable(module).config.to_dict() if hasattr(config, "model_type") else {},
        palettized=parts.palettized,
        dense=parts.dense,
        tied=parts.tied,
        recipe=plan.model_dump(mode="json"),
        provenance=provenance,
    )


def _is_batches(calibration: Any) -> bool:
    """Whether it is arguments of calls by their names, not ids or text."""
    rows = calibration if isinstance(calibration, (list, tuple)) else [calibration]
    return bool(rows) and all(
        isinstance(row, dict) and all(isinstance(value, Tensor) for value in row.values()) for row in rows
    )


def _of_weight(
    weight: Tensor, name: str, options: tuple[int | None, int | None, LutDtype | None], calibration: Any
) -> PalettizedTensor:
    """One weight."""
    if not weight.is_floating_point() or weight.dim() < 2 or not weight.numel():
        raise InputError(
            f"{name}: is {str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}, expected floating point with "
            "at least two axes, [out, in]."
        )
    if not bool(torch.isfinite(weight).all()):
        raise InputError(f"{name}: holds NaN or infinity; it cannot be clustered.")
    importance = None
    if calibration is not None:
        inputs = as_tensor(calibration, "calibration").float()
        if weight.dim() > 2 or not inputs.numel() or inputs.shape[-1:] != weight.shape[1:]:
            raise InputError(
                f"calibration: has shape {list(inputs.shape)}, expected inputs of the layer, [..., {weight.shape[1]}]"
                + ("; of a convolution, palettize the layer itself." if weight.dim() > 2 else ".")
            )
        importance = inputs.reshape(-1, weight.shape[1]).square().mean(0)
        if not bool(torch.isfinite(importance).all()):
            raise InputError("calibration: holds NaN or infinity.")
    rule = fitted_recipe({"": tuple(weight.shape)}, *options).rule_for("")
    assert rule is not None
    rule = rule.fitted(len(weight))
    if importance is not None and makes_up(rule, weight.shape[1]):
        rows = inputs.reshape(-1, weight.shape[1])
        return palettize_compensated(name, weight, rule, rows.t() @ rows / len(rows), samples=len(rows))
    return palettize_weight(name, weight, rule, importance=importance)


def _provenance(where: str) -> dict[str, Any]:
    return {
        "versions": library_versions(),
        "command": _COMMAND,
        "seed": None,
        "base_model": {"reference": f"{where} in memory", "sha256": {}},
    }


def _as_tokenizer(given: Any) -> Any:
    """A tokenizer of transformers, or the one of a folder."""
    if isinstance(given, (str, Path)):
        if not Path(given).is_dir():
            raise InputError(
                f"tokenizer: {given}: no such folder; give one that holds a tokenizer, or a tokenizer."
            )
        return read_tokenizer(given)
    if not callable(given) or not hasattr(given, "save_pretrained"):
        raise InputError(
            f"tokenizer: is {type(given).__name__}, expected a tokenizer of transformers or a folder with one."
        )
    return given

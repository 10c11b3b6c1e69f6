"""Hugging Face folders of many kinds, written from a model whose logits are known.

`EXACT` are kinds that must be read as that model; `REFUSED` are kinds that must not be read, with words that the
message must hold. Each is a function that changes a folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edkm_export.reference.quantized_weights import REFUSED as QUANTIZATIONS
from tests.helpers.quantized_folders import fp8_blocks, metal, one_scale

__all__ = ["EXACT", "REFUSED", "Kind", "edit_config", "edit_weights", "shard"]

UP = "model.layers.0.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
Change = Callable[[Path], None]


@dataclass(frozen=True)
class Kind:
    """A kind of folder.

    Attributes:
        change: what is done to the folder of `case`.
        case: of `odd_families.CASES`.
        weights: the values that the model should have after it, {parameter: value}.
        settings: arguments of the configuration that differ from those of the case.
        names: words of the refusal.
    """

    change: Change
    case: str = "llama"
    weights: Callable[[dict[str, Tensor]], None] = lambda _weights: None
    settings: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()


def edit_config(remove: tuple[str, ...] = (), **changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for name in remove:
            del config[name]
        path.write_text(json.dumps({**config, **changes}))

    return change


def edit_weights(edit: Callable[[dict[str, Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = load_file(path)
        edit(weights)
        contents = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
        save_file(contents, path, metadata={"format": "pt"})

    return change


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def shard(folder: Path) -> None:
    """Two files and an index."""
    whole = load_file(folder / "model.safetensors")
    names = sorted(whole)
    parts = {
        "model-00001-of-00002.safetensors": names[:5],
        "model-00002-of-00002.safetensors": names[5:],
    }
    for file, part in parts.items():
        save_file({name: whole[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def own_head(weights: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(5)
    weights[HEAD] = torch.randn(weights[EMBEDDING].shape, generator=generator) / 6


def twin(weights: dict[str, Tensor]) -> None:
    weights[HEAD] = weights[EMBEDDING].clone()


def head_alone(weights: dict[str, Tensor]) -> None:
    weights[HEAD] = weights.pop(EMBEDDING)


def add(name: str, tensor: Tensor) -> Change:
    return edit_weights(lambda weights: weights.update({name: tensor}))


def file(name: str, content: bytes = b"anything") -> Change:
    return lambda folder: (folder / name).write_bytes(content) and None


def rotations(factor: float) -> Change:
    """Constants of older files: frequencies of head size 16 and base 10,000."""
    frequencies = factor * 10000.0 ** (-torch.arange(0, 16, 2).float() / 16)
    return edit_weights(
        lambda weights: weights.update(
            {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": frequencies.clone() for layer in (0, 1)}
        )
    )


def masks(weights: dict[str, Tensor]) -> None:
    for layer in (0, 1):
        weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(64, 64).tril()[None, None]
        weights[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)


def without_prefix(weights: dict[str, Tensor]) -> None:
    for name in list(weights):
        weights[name.removeprefix("model.").removeprefix("transformer.")] = weights.pop(name)


def older_names(folder: Path) -> None:
    """As transformers 4 wrote it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    given = config.pop("rope_parameters")
    config["rope_theta"], config["torch_dtype"] = given.pop("rope_theta"), config.pop("dtype")
    given["type"] = given.pop("rope_type")
    config["rope_scaling"] = None if given["type"] == "default" else given
    path.write_text(json.dumps(config))


BLOCK = 16


fp8, as_fp8 = fp8_blocks(BLOCK, BLOCK)
FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


def method(name: str, **settings: Any) -> Change:
    return edit_config(quantization_config={"quant_method": name, **settings})


def to(dtype: torch.dtype, *parts: str) -> Callable[[dict[str, Tensor]], None]:
    def change(weights: dict[str, Tensor]) -> None:
        for name in weights:
            if any(part in name for part in parts):
                weights[name] = weights[name].to(dtype)

    return change


def rounded(dtype: torch.dtype, *parts: str) -> Callable[[dict[str, Tensor]], None]:
    def change(weights: dict[str, Tensor]) -> None:
        for name in weights:
            if any(part in name for part in parts):
                weights[name] = weights[name].to(dtype).float()

    return change


EXACT: dict[str, Kind] = {
    "shards": Kind(shard),
    "as transformers 4 wrote it": Kind(older_names),
    "llama3 as transformers 4 wrote it": Kind(older_names, settings={"rope_parameters": LLAMA3}),
    "llama3": Kind(edit_config(), settings={"rope_parameters": LLAMA3}),
    "linear": Kind(edit_config(), settings=rope(rope_type="linear", factor=4.0)),
    "yarn": Kind(edit_config(), settings={"rope_parameters": YARN}),
    "yarn, mscale 0": Kind(edit_config(), settings={"rope_parameters": {**YARN, "mscale": 0, "mscale_all_dim": 1.0}}),
    "yarn, mscale": Kind(
        edit_config(), settings={"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}}
    ),
    "yarn, borders 0": Kind(edit_config(), settings={"rope_parameters": {**YARN, "beta_fast": 0, "beta_slow": 0}}),
    "a window that the family never uses": Kind(edit_config(sliding_window=4)),
    "a window that is switched off": Kind(edit_config(sliding_window=4, use_sliding_window=False), case="qwen2"),
    "head size that is not declared": Kind(edit_config(), case="qwen2", settings={"head_dim": 8}),
    "own head under a tied configuration": Kind(edit_weights(own_head), settings=TIED, weights=own_head),
    "own head in GPT-2": Kind(
        edit_weights(lambda weights: weights.update({HEAD: weights["transformer.wte.weight"] * -1.5})),
        case="gpt2",
        weights=lambda weights: weights.update({HEAD: weights["transformer.wte.weight"] * -1.5}),
    ),
    "equal twin": Kind(edit_weights(twin), settings=TIED),
    "head alone": Kind(edit_weights(head_alone), settings=TIED),
    "stack without its head": Kind(edit_weights(without_prefix), settings=TIED),
    "GPT-2 without prefix": Kind(edit_weights(without_prefix), case="gpt2"),
    "constants of rotation": Kind(rotations(1.0)),
    "masks of GPT-2": Kind(edit_weights(masks), case="gpt2"),
    "FP8 blocks": Kind(both(edit_weights(fp8), edit_config(quantization_config=FP8)), weights=as_fp8),
    **{
        name: Kind(both(edit_weights(change), edit_config(quantization_config=settings)), weights=meant)
        for name, (change, meant), settings in (
            ("FP8 blocks that are cut off", fp8_blocks(20, 24), {**FP8, "weight_block_size": [20, 24]}),
            (
                "FP8 blocks with exponents, cut off", fp8_blocks(24, 20, scale=torch.float8_e8m0fnu),
                {**FP8, "weight_block_size": [24, 20], "scale_fmt": "ue8m0"},
            ),
            ("FP8, one scale a weight", one_scale(()), {**FP8, "weight_block_size": None}),
            (
                "FP8, one scale a weight, as a matrix", one_scale((1, 1)),
                {**FP8, "weight_block_size": None, "activation_scheme": "static"},
            ),
            (
                "MXFP8", fp8_blocks(1, 16, scale=torch.uint8),
                {"quant_method": "mxfp8", "weight_block_size": [1, 16], "scale_fmt": "ue8m0"},
            ),
            *(
                (f"Metal, {bits} bits", metal(bits, 16), {"quant_method": "metal", "bits": bits, "group_size": 16})
                for bits in (2, 4, 8)
            ),
        )
    },
    "bfloat16": Kind(edit_weights(to(torch.bfloat16, "")), weights=rounded(torch.bfloat16, "")),
    "float16": Kind(edit_weights(to(torch.float16, "")), weights=rounded(torch.float16, "")),
    "two types": Kind(edit_weights(to(torch.bfloat16, "mlp")), weights=rounded(torch.bfloat16, "mlp")),
    "float64": Kind(edit_weights(to(torch.float64, "mlp"))),
    "fields of tools": Kind(
        edit_config(
            unsloth_version="2026.1", _name_or_path="/home/someone", temperature=0.6, pruned_heads={}, is_decoder=True,
            task_specific_params={"text-generation": {}}, rope_interleaved=False, use_mrope=None,
        )
    ),
    "code that transformers has itself": Kind(
        edit_config(auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}, attention_bias=False),
        case="phi3",
    ),
    "another format beside": Kind(both(file("consolidated.safetensors"), file("pytorch_model.bin"))),
    "activation under two names": Kind(edit_config(hidden_act="gelu_pytorch_tanh"), case="gemma2"),
    "window patterns of older files": Kind(
        edit_config(remove=("layer_types",), sliding_window_pattern=2), case="gemma3"
    ),
    "context under two names": Kind(edit_config(n_ctx=64), case="gpt2"),
}  # fmt: skip


def lose_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def extra_shard(folder: Path) -> None:
    shard(folder)
    save_file({"more": torch.zeros(2)}, folder / "model-00003-of-00003.safetensors")


def unnamed_tensor(folder: Path) -> None:
    shard(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][UP]
    path.write_text(json.dumps(index))


def moved_tensor(folder: Path) -> None:
    shard(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.7.more"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))


def single_and_index(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    shard(folder)
    (folder / "model.safetensors").write_bytes(content)


def index_that_points_out(folder: Path) -> None:
    shard(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][UP] = "../model.safetensors"
    path.write_text(json.dumps(index))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def scale_lost(weights: dict[str, Tensor]) -> None:
    fp8(weights)
    del weights[f"{UP}_scale_inv"]


def narrow(weights: dict[str, Tensor]) -> None:
    """A block that is cut off at the edge of a weight."""
    fp8(weights)
    weights[f"{UP}_scale_inv"] = weights[f"{UP}_scale_inv"][:, :1]


def offsets_lost(weights: dict[str, Tensor]) -> None:
    metal(4, 16)[0](weights)
    del weights[UP.removesuffix("weight") + "qbiases"]


def huge(value: float) -> Change:
    return edit_weights(lambda weights: weights[UP][0, 1:2].fill_(value))


def to_int8(weights: dict[str, Tensor]) -> None:
    weights[UP] = (weights[UP] * 100).to(torch.int8)


def _refused(
    change: Change, *names: str, case: str = "llama", settings: dict[str, Any] | None = None
) -> Kind:
    return Kind(change, case=case, settings=settings or {}, names=names)


REFUSED: dict[str, Kind] = {
    "shard lost": _refused(lose_shard, "model-00002-of-00002.safetensors", "is missing"),
    "shard too many": _refused(extra_shard, "model-00003-of-00003.safetensors", "does not belong"),
    "tensor outside of the index": _refused(unnamed_tensor, UP, "does not name it"),
    "tensor of the index that is nowhere": _refused(moved_tensor, "model.layers.7.more", "lacks"),
    "file and index": _refused(single_and_index, "model.safetensors and model.safetensors.index.json"),
    "index that points out": _refused(index_that_points_out, "'../model.safetensors'"),
    "pickles": _refused(pickled, "pytorch_model.bin", "safe_serialization=True"),
    "no weights": _refused(lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "NaN": _refused(huge(float("nan")), UP, "NaN"),
    "beyond float16": _refused(huge(70000.0), UP, "70,000", "65,504"),
    "beyond float16, below": _refused(huge(-1e6), UP, "-1,000,000", "65,504"),
    "parameter lost": _refused(edit_weights(lambda weights: weights.pop(UP)), UP, "missing"),
    "parameter too many": _refused(add("model.layers.0.mlp.up_proj.bias", torch.zeros(48)), "up_proj.bias"),
    "parameter of another shape": _refused(
        edit_weights(lambda weights: weights.update({UP: weights[UP][:-1]})), UP, "[47, 32]", "[48, 32]"
    ),
    "untied without a head": _refused(edit_weights(lambda weights: weights.pop(HEAD)), HEAD, "missing"),
    "tied with neither": _refused(
        edit_weights(lambda weights: weights.pop(EMBEDDING)), EMBEDDING, "missing", settings=TIED
    ),
    "embedding twice": _refused(
        edit_weights(lambda weights: weights.update({"embed_tokens.weight": weights[EMBEDDING] * 2})),
        "embed_tokens.weight", "stored twice",
    ),
    "other rotations": _refused(rotations(0.5), "inv_freq", "differs"),
    "unknown field": _refused(edit_config(logit_scale=0.5), "logit_scale", "0.5"),
    "rotation by pairs": _refused(edit_config(rope_interleaved=True), "rope_interleaved", "True"),
    "biases that the family has not": _refused(edit_config(attention_bias=True), "attention_bias", case="mistral"),
    "rotation of a part": _refused(edit_config(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "kind of rotation": _refused(edit_config(**rope(rope_type="ntk", factor=2.0)), "rope_type", "'ntk'"),
    "field of another rotation": _refused(
        edit_config(**rope(rope_type="linear", factor=2.0, beta_fast=32)), "rope_parameters.beta_fast"
    ),
    "scaling without a kind": _refused(edit_config(**rope(factor=8.0)), "rope_parameters.factor"),
    "two kinds of rotation": _refused(
        edit_config(**rope(rope_type="linear", type="dynamic", factor=2.0)), "'linear' and 'dynamic'"
    ),
    "two bases": _refused(edit_config(rope_theta=5.0), "rope_theta", "another base"),
    "two scalings": _refused(edit_config(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling"),
    "settings of layers": _refused(edit_config(per_layer_config={"0": {"sliding_window": 4}}), "per_layer_config"),
    "two contexts": _refused(edit_config(n_ctx=32), "n_ctx", case="gpt2"),
    "another activation": _refused(edit_config(hidden_act="silu"), "hidden_act", case="gemma2"),
    "class of another task": _refused(
        edit_config(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"
    ),
    "class of its own": _refused(
        edit_config(architectures=["OddForCausalLM"], auto_map={"AutoModelForCausalLM": "odd.OddForCausalLM"}),
        "OddForCausalLM",
    ),
    "unknown type with code": _refused(
        edit_config(model_type="odd", auto_map={"AutoConfig": "odd.OddConfig"}), "'odd'", "not run"
    ),
    "vision": _refused(edit_config(model_type="gemma3", vision_config={}), "vision part"),
    "audio": _refused(edit_config(audio_config={}), "audio part"),
    **{
        name: _refused(method(key, bits=4), f"quantized by {name}, which", "give the float model")
        for key, (name, _) in QUANTIZATIONS.items()
        if key not in ("mlx", "bitsandbytes")
    },
    "bitsandbytes": _refused(method("bitsandbytes", load_in_4bit=True), "bitsandbytes", "give the float model"),
    "bitsandbytes of older files": _refused(
        edit_config(quantization_config={"load_in_8bit": True}), "bitsandbytes", "give the float model"
    ),
    "MLX": _refused(
        edit_config(quantization={"bits": 4, "group_size": 64}, quantization_config={"bits": 4, "group_size": 64}),
        "MLX", "give the float model",
    ),
    "MLX, older": _refused(edit_config(quantization={"bits": 4, "group_size": 64}), "MLX", "give the float model"),
    "Metal of 3 bits": _refused(method("metal", bits=3, group_size=16), "3", "give the float model"),
    "Metal without offsets": _refused(
        both(edit_weights(offsets_lost), method("metal", bits=4, group_size=16)), UP, "qbiases do not fit"
    ),
    "Metal of other groups": _refused(
        both(edit_weights(metal(4, 8)[0]), method("metal", bits=4, group_size=16)), "do not fit", "groups of 16"
    ),
    "FP8 of several scales": _refused(
        both(edit_weights(fp8), edit_config(quantization_config={**FP8, "weight_block_size": None})),
        "no weight_block_size", "give the float model",
    ),
    "FP8 with exponents that nothing names": _refused(
        both(edit_weights(fp8_blocks(16, 16, scale=torch.uint8)[0]), edit_config(quantization_config=FP8)),
        "holds scales as U8", "give the float model",
    ),
    "a method that nobody knows": _refused(method("seven"), "'seven'", "give the float model"),
    "int8 without scale": _refused(edit_weights(to_int8), UP, "I8", "give the float model"),
    "FP8 without a word": _refused(edit_weights(fp8), "F8_E4M3", "give the float model"),
    "FP8 without a scale": _refused(
        both(edit_weights(scale_lost), edit_config(quantization_config=FP8)), UP, "without"
    ),
    "FP8 blocks that do not fit": _refused(
        both(edit_weights(narrow), edit_config(quantization_config=FP8)), UP, "do not fit"
    ),
    "FP8 without the size of blocks": _refused(
        both(edit_weights(fp8), method("fp8")), "weight_block_size", "give the float model"
    ),
    "adapter beside": _refused(file("adapter_config.json", b"{}"), "LoRA adapter", "--adapter"),
}  # fmt: skip

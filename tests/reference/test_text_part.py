"""The text model of vision-language folders, against the whole model of transformers on a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from edkm_export.decoder.build import decoder_config
from edkm_export.errors import SourceError
from edkm_export.reference.source import Source, account, load_model
from edkm_export.reference.stored_buffers import stored_buffers
from tests.helpers import odd_families
from tests.helpers.odd_families import plain

TEXT = torch.arange(3, 43)[None] * 7 % 90 + 3
_VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def gemma3(**text: Any) -> Any:
    config = transformers.Gemma3Config(
        text_config=plain("gemma3_text") | text, vision_config=_VISION, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def gemma4(**text: Any) -> Any:
    """With what published folders store for layers that use the keys and values of another one."""
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
        "num_key_value_heads": 2, "position_embedding_size": 16,
    }  # fmt: skip
    audio = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "subsampling_conv_channels": [4, 4],
        "output_proj_dims": 16,
    }  # fmt: skip
    text = {**plain("gemma4_text"), "use_bidirectional_attention": "vision", **text}
    model = transformers.Gemma4ForConditionalGeneration(
        transformers.Gemma4Config(
            text_config=text, vision_config=vision, audio_config=audio, image_token_id=94, video_token_id=95,
            audio_token_id=93,
        )
    )  # fmt: skip
    for layer in model.model.language_model.layers:
        layer.layer_scalar.fill_(0.5)
        if layer.self_attn.is_kv_shared_layer:
            size = layer.self_attn.head_dim
            layer.self_attn.k_proj = torch.nn.Linear(text["hidden_size"], size, bias=False)
            layer.self_attn.k_norm = torch.nn.RMSNorm(size)
    return model


def qwen3_vl(**text: Any) -> Any:
    rotation = {
        "rope_type": "default",
        "rope_theta": 5000.0,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    }
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(
        text_config=plain("qwen3") | {"rope_parameters": rotation} | text, vision_config=vision
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def mistral3(kind: str, **text: Any) -> Any:
    config = transformers.Mistral3Config(
        text_config={**plain(kind), "model_type": kind} | text, vision_config=_VISION, image_token_index=95
    )
    return transformers.Mistral3ForConditionalGeneration(config)


MODELS = {
    "gemma3": (gemma3, "gemma3_text"),
    "gemma3, own head": (lambda: gemma3(tie_word_embeddings=False), "gemma3_text"),
    "gemma4": (gemma4, "gemma4_text"),
    "qwen3_vl": (qwen3_vl, "qwen3"),
    "qwen3_vl, biases": (lambda: qwen3_vl(attention_bias=True), "qwen3"),
    "mistral3": (lambda: mistral3("mistral"), "mistral"),
    "mistral3, scaled queries": (lambda: mistral3("ministral3"), "ministral3"),
}


def saved(name: str, folder: Path) -> tuple[Any, Source]:
    make, _ = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model, Source.parse(str(folder))


def rename(folder: Path, old: str, new: str) -> None:
    """As older versions of transformers named them."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = {name.replace(old, new, 1): value for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", MODELS)
def test_text_part_computes_what_the_whole_does(name, tmp_path):
    model, source = saved(name, tmp_path / "model")
    found = account(source)
    assert not found.not_understood, found.not_understood
    text = load_model(source, torch.float32)
    assert text.config.model_type == MODELS[name][1]
    assert set(found.tensors) == {*dict(text.named_parameters()), *stored_buffers(text)}
    assert any("vision" in each or "visual" in each for each in found.without_effect)
    with torch.no_grad():
        expected = model(input_ids=TEXT, use_cache=False).logits
        logits = text(input_ids=TEXT, use_cache=False).logits
    # float32 on both sides, the same sums
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    decoder_config(text.config.to_dict(), "model.pt")  # a family that can be exported


def test_a_folder_of_gemma3n(tmp_path):
    """Its vision tower needs a library of its own, so the folder is made from a text model."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    model = odd_families.build("gemma3n")
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    weights = {
        name.replace("model.", "model.language_model.", 1): value for name, value in load_file(path).items()
    }
    others = ("vision_tower.stem.weight", "audio_tower.conformer.0.weight", "embed_vision.soft.weight")
    stored = (
        "layers.2.self_attn.k_proj.weight",
        "layers.2.self_attn.v_proj.weight",
        "layers.2.self_attn.k_norm.weight",
    )
    weights |= {f"model.{name}": torch.ones(2, 2) for name in others}
    weights |= {f"model.language_model.{name}": torch.ones(2, 2) for name in stored}
    save_file(weights, path, metadata={"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    outer = {
        "model_type": "gemma3n",
        "text_config": text,
        "vision_config": {},
        "audio_config": {},
        "boa_token_id": 5,
    }
    (folder / "config.json").write_text(
        json.dumps({**outer, "architectures": ["Gemma3nForConditionalGeneration"]})
    )
    source = Source.parse(str(folder))
    found = account(source)
    assert not found.not_understood, found.not_understood
    left = found.without_effect
    assert all(any(name in each for each in left) for name in (*others, *stored))
    assert "sound" in next(why for name, why in left.items() if "audio_tower" in name)
    with torch.no_grad():
        expected = model(input_ids=TEXT, use_cache=False).logits
        logits = load_model(source, torch.float32)(input_ids=TEXT, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)  # eager attention or a kernel


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_names_of_older_folders(name, tmp_path):
    _, source = saved(name, tmp_path / "model")
    text = load_model(source, torch.float32)
    rename(tmp_path / "model", "model.language_model.", "language_model.model.")
    older = load_model(source, torch.float32)
    state = text.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in older.state_dict().items())


def test_a_field_that_nobody_knows_is_refused(tmp_path):
    _model, source = saved("gemma3", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    for inner in ("text", "outer"):
        changed = json.loads(json.dumps(config))
        (changed["text_config"] if inner == "text" else changed)["twist"] = 3
        path.write_text(json.dumps(changed))
        with pytest.raises(SourceError, match="twist"):
            load_model(source)

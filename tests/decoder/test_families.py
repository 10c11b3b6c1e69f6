"""The decoder of every family against transformers' own model."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edkm_export.decoder.build import build_decoder
from edkm_export.decoder.config import FULL, SLIDING
from edkm_export.decoder.context import MASKED, Context, causal_mask, sliding_mask
from edkm_export.decoder.families import FAMILIES
from edkm_export.decoder.families.settings import PartlyRotarySettings
from edkm_export.decoder.positions import PositionTables
from edkm_export.decoder.whole_sequence import WholeSequence
from edkm_export.errors import CheckpointError
from tests.helpers.growing_cache import GrowingCache
from tests.helpers.odd_families import CASES, build, build_case, checkpoint_of, keys_of, plain

LENGTH = 24
TOLERANCE = 1e-4  # float32 on both sides, sums in another order; logits are of size one


@pytest.fixture(scope="module", params=CASES)
def model(request):
    return build(request.param)


def tokens_of(model, batch: int = 1) -> Tensor:
    """int64 [batch, LENGTH]"""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, model.config.vocab_size, (batch, LENGTH), generator=generator)


def context_of(decoder, tables, positions: Tensor, keys: Tensor, hidden: Tensor | None = None) -> Context:
    """Masks for positions [batch, new] and keys [batch, total]; hidden bool [batch, total]: padding."""
    mask = causal_mask(positions, keys)
    if hidden is not None:
        mask = mask.masked_fill(hidden[:, None, None, :], MASKED)
    masks = {FULL: mask}
    if decoder.config.sliding_window is not None:
        masks[SLIDING] = sliding_mask(mask, positions, keys, decoder.config.sliding_window)
    real = None if hidden is None else (~hidden).float()[:, -positions.shape[1] :, None]
    return Context(positions.clamp_min(0), tables(positions.clamp_min(0)), masks, real)


@torch.no_grad()
def test_whole_sequence(model):
    tokens = tokens_of(model)
    expected = model(tokens, use_cache=False).logits
    found = WholeSequence(build_decoder(checkpoint_of(model)), model.config.to_dict(), LENGTH)(tokens.int())
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_prompt_and_single_tokens_with_a_cache(model):
    tokens = tokens_of(model, 2)
    decoder = build_decoder(checkpoint_of(model))
    tables, cache = (
        PositionTables(decoder.config, model.config.to_dict(), 48),
        GrowingCache(decoder.config, 2),
    )
    parts = []
    for start, stop in [(0, 13), (13, 16), *((at, at + 1) for at in range(16, LENGTH))]:
        positions = torch.arange(start, stop).expand(2, -1)
        context = context_of(decoder, tables, positions, torch.arange(stop).expand(2, -1))
        parts.append(decoder(tokens[:, start:stop], context, cache))
    expected = model(tokens, use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_batch_with_left_padding(model):
    tokens = tokens_of(model, 3)
    lengths = torch.tensor([LENGTH, 17, 9])
    positions = torch.arange(LENGTH)[None] - (LENGTH - lengths)[:, None]
    seen = positions >= 0
    decoder = build_decoder(checkpoint_of(model))
    tables = PositionTables(decoder.config, model.config.to_dict(), LENGTH)
    found = decoder(tokens, context_of(decoder, tables, positions, positions, ~seen))
    expected = model(
        tokens, attention_mask=seen.long(), position_ids=positions.clamp_min(0), use_cache=False
    ).logits
    torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=TOLERANCE)


def test_names_and_shapes_are_those_of_transformers(model):
    made = checkpoint_of(model)
    decoder = build_decoder(made)
    assert decoder.state_dict().keys() == model.state_dict().keys()
    assert (decoder.lm_head.weight is decoder.embedding.weight) == model.config.tie_word_embeddings


def test_a_head_stored_apart_from_a_tied_embedding_is_refused():
    """It would be ignored: the decoder, like transformers, takes the embedding's weight."""
    made = checkpoint_of(build("gemma3"))
    made.dense["lm_head.weight"] = made.dense["model.embed_tokens.weight"] * 2
    made.tied.clear()
    with pytest.raises(CheckpointError, match="lm_head.weight is stored apart, but .* tie_word_embeddings"):
        build_decoder(made)


SIZES = ("vocab_size", "n_positions", "max_position_embeddings", "head_dim")
ROTATIONS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 4.0,
        "mscale": 0.7, "mscale_all_dim": 1.3,
    },
    {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "truncate": False,
        "attention_factor": 0.9,
    },
]  # fmt: skip


def values_of(annotation: Any) -> st.SearchStrategy[Any] | None:
    """Values of a field's type; None: it is left as it is."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values_of(inner[0])
    if origin in (Union, UnionType):
        known = [each for each in map(values_of, inner) if each is not None]
        return st.one_of(st.none(), *known) if known else None
    if origin is Literal:
        return st.sampled_from(inner)
    if annotation is bool:
        return st.booleans()
    if annotation is float:
        return st.floats(0.5, 50)
    if annotation is int:
        return st.integers(1, 30)
    return None


@st.composite
def rotations(draw, kind: str, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of one kind of layers."""
    part = issubclass(FAMILIES[kind], PartlyRotarySettings)
    given: dict[str, Any] = {"rope_theta": draw(st.sampled_from([100.0, 10000.0, 500000.0]))}
    rotary = head_dim
    if part:
        given["partial_rotary_factor"] = draw(
            st.sampled_from([1.0, 0.5]) if head_dim % 4 == 0 else st.just(1.0)
        )
        rotary = int(head_dim * given["partial_rotary_factor"])
    factors = st.lists(st.floats(1, 4), min_size=rotary // 2, max_size=rotary // 2)
    longrope = st.fixed_dictionaries(
        {
            "rope_type": st.just("longrope"),
            "original_max_position_embeddings": st.just(32),
            "short_factor": factors,
            "long_factor": factors,
        }
    )
    kinds = st.sampled_from(ROTATIONS[:1] if kind == "phi3" else ROTATIONS)
    return given | draw(kinds | longrope)


@st.composite
def random_cases(draw, kinds: tuple[str, ...] = tuple(FAMILIES)) -> tuple[str, dict[str, Any]]:
    """(model type, configuration) of any family, from the fields that it declares."""
    kind = draw(st.sampled_from(kinds))
    keys, made = keys_of(kind), plain(kind)
    kv_heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, head_dim = kv_heads * draw(st.integers(1, 3)), 2 * draw(st.integers(2, 7))
    width = draw(st.integers(3, 7)) if "head_dim" in made and kind != "phi3" else head_dim
    sizes = {
        "hidden_size": heads * width, "n_embd": heads * width, "intermediate_size": draw(st.integers(5, 30)),
        "num_hidden_layers": layers, "n_layer": layers, "num_attention_heads": heads, "n_head": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim,
    }  # fmt: skip
    made |= {key: size for key, size in sizes.items() if key in made}
    for key, field in keys.items():
        values = values_of(field.annotation)
        if key in sizes or key in SIZES or "eps" in (field.alias or key) or values is None:
            continue
        if field.examples:  # None only where an example is None
            values = st.sampled_from(field.examples) | values.filter(lambda value: value is not None)
        made[key] = draw(values)
    types = st.sampled_from(["full_attention", "sliding_attention"])
    if "layer_types" in keys:
        made["layer_types"] = draw(st.lists(types, min_size=layers, max_size=layers))
        if "sliding_attention" in made["layer_types"]:
            made |= {"sliding_window": made["sliding_window"] or 5, "use_sliding_window": True}
    if "max_position_embeddings" in keys:
        default = transformers.AutoConfig.for_model(kind).rope_parameters
        if "full_attention" in default:
            made["rope_parameters"] = {each: draw(rotations(kind, head_dim)) for each in default}
        else:
            own = made.get("rope_parameters", {})  # with settings that this family alone has
            optional = not keys["rope_parameters"].is_required() if own else True
            made["rope_parameters"] = ({} if optional and draw(st.booleans()) else own) | draw(
                rotations(kind, head_dim)
            )
    if kind == "phi3":
        made["original_max_position_embeddings"] = 32
    return kind, made


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=random_cases())
@torch.no_grad()
def test_random_configurations(case):
    model = build_case(*case)
    tokens = tokens_of(model)
    found = WholeSequence(build_decoder(checkpoint_of(model)), model.config.to_dict(), LENGTH)(tokens)
    expected = model(tokens, use_cache=False).logits
    # as above, relative where a random model has larger logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=TOLERANCE)

"""Random small configurations of every family, from the fields that it declares."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import transformers
from hypothesis import strategies as st

from edkm_export.decoder.families import FAMILIES
from edkm_export.decoder.families.settings import PartlyRotarySettings
from tests.helpers.odd_families import keys_of, plain

__all__ = ["random_cases"]

_SIZES = ("vocab_size", "n_positions", "max_position_embeddings", "head_dim")
_SHAPES = (  # sizes that must fit each other
    *("block_", "conv_", "linear_", "mamba_"),
    *("num_global_", "num_kv_shared_", "vocab_size_per_", "altup_", "laurel_"),
)
_ROTATIONS: list[dict[str, Any]] = [
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


def _values_of(annotation: Any) -> st.SearchStrategy[Any] | None:
    """Values of a field's type; None: it is left as it is."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values_of(inner[0])
    if origin in (Union, UnionType):
        known = [each for each in map(_values_of, inner) if each is not None]
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


def _choices(annotation: Any) -> tuple[Any, ...]:
    """Members of the literal in a type."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((found for inner in get_args(annotation) if (found := _choices(inner))), ())


@st.composite
def _rotations(draw, kind: str, head_dim: int) -> dict[str, Any]:
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
    kinds = st.sampled_from(_ROTATIONS[:1] if kind == "phi3" else _ROTATIONS)
    return given | draw(kinds | longrope)


def _sharing(draw: Any, types: list[str]) -> dict[str, Any]:
    """Layers that use keys and values of earlier ones, behind some that have their own; the last one is full."""
    types[-1] = "full_attention"
    sharing = draw(st.lists(st.sampled_from(types), max_size=2))
    if sharing:
        sharing[-1] = "full_attention"
    sizes = {"num_hidden_layers": len(types) + len(sharing), "num_kv_shared_layers": len(sharing)}
    return {"layer_types": [*types, *sharing], **sizes}


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
        "shared_intermediate_size": draw(st.integers(5, 30)),
        "num_hidden_layers": layers, "n_layer": layers, "num_attention_heads": heads, "n_head": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim,
    }  # fmt: skip
    made |= {key: size for key, size in sizes.items() if key in made}
    for key, field in keys.items():
        values = _values_of(field.annotation)
        if key in sizes or key in _SIZES or "eps" in (field.alias or key) or values is None:
            continue
        if key.startswith(_SHAPES):
            values = st.sampled_from(field.examples or [field.default])
        elif field.examples:  # None only where an example is None
            values = st.sampled_from(field.examples) | values.filter(lambda value: value is not None)
        made[key] = draw(values)
    if "layer_types" in keys:
        types = st.sampled_from(_choices(keys["layer_types"].annotation))
        made["layer_types"] = draw(st.lists(types, min_size=layers, max_size=layers))
        if "num_kv_shared_layers" in keys:
            made |= _sharing(draw, made["layer_types"])
        if "global_head_dim" in keys:
            made |= {"num_global_key_value_heads": None, "global_head_dim": 2 * draw(st.integers(2, 7))}
        if "sliding_attention" in made["layer_types"]:
            made |= {"sliding_window": made["sliding_window"] or 5, "use_sliding_window": True}
    if "max_position_embeddings" in keys:
        default = transformers.AutoConfig.for_model(kind).rope_parameters
        if "full_attention" in default:
            of_full = {"full_attention": made.get("global_head_dim", head_dim)}
            made["rope_parameters"] = {
                each: draw(_rotations(kind, of_full.get(each, head_dim))) for each in default
            }
        else:
            own = made.get("rope_parameters", {})  # with settings that this family alone has
            optional = not keys["rope_parameters"].is_required() if own else True
            made["rope_parameters"] = ({} if optional and draw(st.booleans()) else own) | draw(
                _rotations(kind, head_dim)
            )
    if "activation_sparsity_pattern" in keys:
        parts = st.sampled_from([0.0, 0.3, 0.9])
        count = made["num_hidden_layers"]
        made["activation_sparsity_pattern"] = draw(st.lists(parts, min_size=count, max_size=count))
        made["altup_active_idx"] = made["altup_num_inputs"] - draw(st.integers(1, 2))
    if "global_head_dim" in keys and draw(st.booleans()):
        part = {"rope_theta": 1000.0, "partial_rotary_factor": draw(st.sampled_from([0.3, 1.0]))}
        made["rope_parameters"]["full_attention"] = {"rope_type": "proportional", **part}
    if "linear_num_key_heads" in keys:
        made["linear_num_value_heads"] = made["linear_num_key_heads"] * draw(st.integers(1, 3))
    if kind == "phi3":
        made["original_max_position_embeddings"] = 32
    return kind, made

"""Changes of .mlpackages: what the verifier must find, and what it must not mind."""

from __future__ import annotations

import numpy as np

from tests.faults import coreml_blobs as blobs
from tests.faults import coreml_operations as ops
from tests.faults import coreml_states as states
from tests.faults.coreml_program import edit
from tests.faults.mutation import DOWN, EMBEDDING, FINAL_NORM, GATE, NORM, OUT, Q1, UP, K, Mutation, Q, V

__all__ = ["COREML_MUTATIONS", "COREML_STATE_MUTATIONS"]

COREML_MUTATIONS = [
    Mutation(
        "bytes", "one LUT value has another sign", blobs.edit_blob(blobs.part(Q, "lut"), blobs.flip(1, 0x80))
    ),
    Mutation(
        "bytes",
        "one LUT value is large",
        blobs.edit_blob(blobs.part(Q, "lut"), blobs.halves(blobs.set_value(8, 4.0))),
        module="model.layers.0.self_attn.q_proj",
    ),
    Mutation(
        "bytes",
        "one LUT value is not finite",
        blobs.edit_blob(blobs.part(UP, "lut"), blobs.halves(blobs.set_value(3, np.inf))),
    ),
    Mutation("bytes", "last bit of a LUT value", blobs.edit_blob(blobs.part(Q, "lut"), blobs.flip(0, 1))),
    Mutation(
        "bytes",
        "swapped groups",
        blobs.edit_blob(blobs.part(DOWN, "lut"), blobs.halves(blobs.swap_groups)),
        module="model.layers.0.mlp.down_proj",
    ),
    Mutation(
        "bytes",
        "a LUT is scaled by 1.05",
        blobs.edit_blob(blobs.part(OUT, "lut"), blobs.halves(blobs.scale(1.05))),
    ),
    Mutation("bytes", "one index", blobs.edit_blob(blobs.part(Q, "indices"), blobs.flip(100, 1))),
    Mutation("bytes", "indices of two layers are exchanged", blobs.swap_blobs(Q, Q1)),
    Mutation(
        "bytes",
        "one index of the embedding",
        blobs.edit_blob(blobs.part(EMBEDDING, "indices"), blobs.flip(5000, 0x80)),
    ),
    Mutation(
        "bytes", "exponent of a norm weight", blobs.edit_blob(blobs.part(NORM, "dense"), blobs.flip(1, 0x04))
    ),
    Mutation("bytes", "RoPE tables of another base", blobs.rope_base, module="model.rotary_emb"),
    Mutation("bytes", "sines off by one position", blobs.shifted_positions, module="model.rotary_emb"),
    Mutation("bytes", "mask without causality", blobs.open_mask, module="model.layers.0.self_attn"),
    Mutation("bytes", "file of weights is truncated", blobs.truncate),
    Mutation("bytes", "record with another dtype", blobs.record_field(1, 3)),
    Mutation("bytes", "record that points 64 bytes further", blobs.record_field(3, 64)),
    Mutation("ops", "residual is subtracted", edit(ops.sub_residual), module="model.layers.0"),
    Mutation("ops", "residual is forgotten", edit(ops.skip_residual)),
    Mutation("ops", "gate is added", edit(ops.gate_by_add), module="model.layers.0.mlp"),
    Mutation("ops", "silu is a sigmoid", edit(ops.retype("silu", 0, "sigmoid")), module="model.layers.0.mlp"),
    Mutation("ops", "silu is a relu", edit(ops.retype("silu", 3, "relu")), module="model.layers.3.mlp"),
    Mutation(
        "ops",
        "rsqrt is a sqrt",
        edit(ops.square_root),
        module="model.layers.0.input_layernorm",
    ),
    Mutation("ops", "mean is a maximum", edit(ops.retype("reduce_mean", 1, "reduce_max"))),
    Mutation("ops", "mean is a sum", edit(ops.retype("reduce_mean", 2, "reduce_sum"))),
    Mutation(
        "ops",
        "missing norm weight",
        edit(ops.bypass_norm_weight(NORM)),
        module="model.layers.1.input_layernorm",
    ),
    Mutation(
        "ops",
        "missing weight of the last norm",
        edit(ops.bypass_norm_weight(FINAL_NORM)),
        module="model.norm",
    ),
    Mutation("ops", "attention without mask", edit(ops.drop_mask), module="model.layers.0.self_attn"),
    Mutation("ops", "float16 overflow", edit(ops.overflow), module="model.layers.0.mlp.down_proj"),
    Mutation("ops", "an op that does not exist", edit(ops.retype("silu", 0, "siluh"))),
    Mutation("attributes", "rotation the other way", edit(ops.rotate_backwards), module="model.rotary_emb"),
    Mutation("attributes", "epsilon of a norm", edit(ops.norm_epsilon)),
    Mutation(
        "attributes",
        "heads are transposed otherwise",
        edit(ops.ints("transpose", 0, "perm", ops.reversed_halves)),
    ),
    Mutation("attributes", "key heads repeated in another order", edit(ops.repeat_heads_wrongly)),
    Mutation("attributes", "mean over positions", edit(ops.ints("reduce_mean", 0, "axes", lambda _: [1]))),
    Mutation(
        "attributes",
        "rows of the embedding along the other axis",
        edit(ops.ints("gather", 0, "axis", lambda _: [1])),
    ),
    Mutation("names", "two parameters have each other's name", edit(ops.metadata(ops.swap_names))),
    Mutation("names", "a parameter has no name", edit(ops.metadata(lambda names: names.popitem()))),
    Mutation("names", "an output of another name", edit(ops.rename_output)),
    Mutation("names", "an input of another name", edit(ops.rename_input)),
    Mutation("shapes", "an op declares another shape", edit(ops.declare("linear", 0, 2, 64))),
    Mutation(
        "shapes", "a reshape to other heads", edit(ops.ints("reshape", 0, "shape", ops.reversed_halves))
    ),
    Mutation("shapes", "an input of half the length", edit(ops.shorten_input)),
    Mutation("shapes", "hidden states as logits", edit(ops.other_output)),
    Mutation("order", "key and value projection exchanged", edit(ops.swap_weights(K, V))),
    Mutation("order", "gate and up projection exchanged", edit(ops.swap_weights(GATE, UP))),
    Mutation("order", "query and key exchanged", edit(ops.exchange_query_and_key)),
    Mutation("order", "halves of the rotation exchanged", edit(ops.turn_concat), module="model.rotary_emb"),
    Mutation("order", "two layers exchanged", edit(ops.swap_layers)),
    Mutation("order", "a layer is skipped", edit(ops.skip_layer)),
    Mutation("order", "an op before what it needs", edit(ops.too_early)),
    Mutation("ops", "ops renamed", edit(ops.rename_ops), harmful=False),
    Mutation("names", "author and a note", edit(ops.describe), harmful=False),
    Mutation("order", "factors exchanged", edit(ops.turn_product), harmful=False),
    Mutation("order", "summands exchanged", edit(ops.turn_sums), harmful=False),
    Mutation("ops", "an op that nobody reads", edit(ops.unused), harmful=False),
    Mutation("order", "independent ops exchanged", edit(ops.independent_order), harmful=False),
    Mutation("bytes", "manifest indented", ops.indent_manifest, harmful=False),
]
"""For packages with whole-sequence logits; those of bytes and operations hold for other interfaces as well."""

COREML_STATE_MUTATIONS = [
    Mutation("states", "off-by-one cache position", edit(states.late_positions), module="model.rotary_emb"),
    Mutation(
        "states", "keys kept as values", edit(states.keys_as_values), module="model.layers.1.self_attn.v_proj"
    ),
    Mutation(
        "states", "keys of two layers in one place", edit(states.same_slot), module="model.layers.1.self_attn"
    ),
    Mutation(
        "states", "keys are not kept", edit(states.forget_update), module="model.layers.0.self_attn.k_proj"
    ),
    Mutation("states", "states of half the length", edit(states.smaller_state)),
    Mutation("ops", "ops renamed", edit(ops.rename_ops), harmful=False),
    Mutation("order", "summands exchanged", edit(ops.turn_sums), harmful=False),
]
"""For packages with the interface swift-transformers."""

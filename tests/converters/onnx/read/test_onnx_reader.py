"""The reader gives back what was exported, and notices when a graph computes with something else."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from converters.onnx import load_graph
from converters.onnx.format import PARTS
from converters.onnx.read.executors import ReferenceRuntime
from converters.onnx.read.interface import batch_feeds
from converters.onnx.write import forms
from edkm_export.errors import InputError, PackageError
from edkm_export.reference.hard_model import load_hard_model
from tests.helpers import odd_families
from tests.helpers.onnx_build import external
from tests.helpers.onnx_edits import (
    GATE0,
    K0,
    K1,
    UP0,
    V0,
    exchange,
    exchange_parts,
    operands,
    rename,
    replace_uses,
    sort,
)
from tests.helpers.onnx_models import export, palettized_checkpoint
from tests.helpers.palettes import random_palette

EMBEDDING = "model.embed_tokens.weight"

FORMS = [
    *(("exact", {"n_bits": n_bits}) for n_bits in (1, 2, 3, 4, 6, 8)),
    *(("low-memory", {"n_bits": n_bits}) for n_bits in (1, 2, 3, 4, 6, 8)),
    *(("fast", {"n_bits": n_bits, "int8": True}) for n_bits in (1, 2, 3, 4, 6, 8)),
    *(("fast", {"n_bits": n_bits, "int8": True, "int4": True}) for n_bits in (1, 2, 3, 4, 6)),
    *((profile, {"n_bits": 3, "dim": 2}) for profile in ("exact", "low-memory")),
    *((profile, {"n_bits": 4, "dim": 4, "groups_in": 2}) for profile in ("exact", "low-memory")),
    *((profile, {"n_bits": 6, "groups_in": 2}) for profile in ("exact", "low-memory")),
    *((profile, {"n_bits": 3, "int8": True, "tied": False}) for profile in ("exact", "low-memory", "fast")),
]


def hard_logits(checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_hard_model(checkpoint)(input_ids=tokens[None], use_cache=False).logits[0]


@pytest.mark.parametrize(
    ("profile", "options"),
    FORMS,
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_reads_back_what_was_onnx_folder(tmp_path, profile, options):
    checkpoint = palettized_checkpoint(**options)
    graph = load_graph(export(checkpoint, tmp_path / "out", runtime=profile))
    assert graph.profile == profile
    found, dense = graph.palettized(), graph.dense()
    assert found.keys() == checkpoint.palettized.keys()
    assert all(found[name].same_bits(tensor) for name, tensor in checkpoint.palettized.items())
    assert all(torch.equal(dense[name].float(), tensor.float()) for name, tensor in checkpoint.dense.items())
    tokens = torch.randint(320, (9,), generator=torch.Generator().manual_seed(0))
    # The reference implementation does not round activations in the fast profile, so that all that may remain is
    # float32's own noise, about 1e-5 here; one wrong index moves logits by more than 1e-2.
    feeds = batch_feeds(graph.graph, [tokens], len(tokens))
    logits = torch.from_numpy(ReferenceRuntime(graph.graph).run(feeds)["logits"][0])
    torch.testing.assert_close(logits, hard_logits(checkpoint, tokens), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("largest", [4000, 900, 200])
def test_weights_that_are_decoded_in_parts(tmp_path, monkeypatch, largest):
    """Whole row groups, parts of one, and the head part after part."""
    monkeypatch.setattr(forms, "_LARGEST_DECODED", largest)
    checkpoint = palettized_checkpoint(3)
    graph = load_graph(export(checkpoint, tmp_path / "out", runtime="low-memory"))
    found = graph.palettized()
    assert all(found[name].same_bits(tensor) for name, tensor in checkpoint.palettized.items())
    tokens = torch.arange(9)
    feeds = batch_feeds(graph.graph, [tokens], len(tokens))
    for run in (ReferenceRuntime(graph.graph).run, graph.runtime().run):
        logits = torch.from_numpy(run(feeds)["logits"][0])
        torch.testing.assert_close(logits, hard_logits(checkpoint, tokens), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("case", ["gpt2: odd", "phi3", "gemma3", "qwen3"])
def test_families(tmp_path, case):
    """Fused projections, turned weights and shared tables are followed too."""
    model = odd_families.checkpoint_of(odd_families.build(case))
    matrices = {name for name, tensor in model.dense.items() if tensor.dim() == 2}
    checkpoint = dataclasses.replace(
        model,
        palettized={name: random_palette(tuple(model.dense[name].shape), 3, name=name) for name in matrices},
        dense={name: tensor.half() for name, tensor in model.dense.items() if name not in matrices},
    )
    found = load_graph(
        export(checkpoint, tmp_path / "out", runtime="low-memory", dtype="float16")
    ).palettized()
    assert found.keys() == matrices
    assert all(found[name].same_bits(tensor) for name, tensor in checkpoint.palettized.items())


@pytest.fixture(params=["exact", "low-memory", "low-memory 18", "fast", "fast 18", "fast int4"])
def changed(request, change_onnx):
    """A function that changes the message of a copy, and gives its folder."""
    return partial(change_onnx, request.param)


@pytest.mark.parametrize("other", [K1, V0])
def test_layers_exchanged(changed, other):
    with pytest.raises(PackageError, match="weights of the graph are exchanged"):
        load_graph(changed(exchange_parts(K0, other))).palettized()


def test_keys_and_values_exchanged(changed):
    with pytest.raises(PackageError, match="weights of the graph are exchanged"):
        load_graph(changed(exchange(K0, V0))).palettized()


@pytest.mark.parametrize("part", ["codes", "codes_high", "lut"])
def test_parts_of_two_weights_mixed(changed, part):
    """The nodes of one weight take a part of another, of the same shape."""

    def edit(model):
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                if name in (f"{K0}.{part}", f"{K1}.{part}"):
                    node.input[place] = f"{K1 if name.startswith(K0) else K0}.{part}"

    with pytest.raises(PackageError, match="takes parts of it and of"):
        load_graph(changed(edit)).palettized()


@pytest.mark.parametrize("part", ["codes", "codes_high", "lut"])
def test_names_exchanged(changed, part):
    """A name that stands for another's bytes gives a tensor of other bits, which the verifier then reports."""
    before = load_graph(changed(lambda model: None)).palettized()
    found = load_graph(changed(rename(K0, K1, part))).palettized()
    assert {name for name in found if not found[name].same_bits(before[name])} == {K0, K1}


def test_all_names_of_two_weights_exchanged(changed):
    def edit(model):
        parts = [part for part in PARTS if any(one.name == f"{K0}.{part}" for one in model.graph.initializer)]
        for part in parts:
            rename(K0, K1, part)(model)
        renamed = {
            f"{mine}.{part}": f"{other}.{part}" for part in parts for mine, other in ((K0, K1), (K1, K0))
        }
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                node.input[place] = renamed.get(name, name)

    with pytest.raises(PackageError, match="weights of the graph are exchanged"):
        load_graph(changed(edit)).palettized()


def test_weight_that_nothing_uses(changed):
    def edit(model):
        for (mine, here), (other, there) in zip(operands(model, UP0), operands(model, GATE0), strict=True):
            mine.input[here] = other.input[there]

    with pytest.raises(PackageError, match=f"{UP0}: nothing uses it"):
        load_graph(changed(edit)).palettized()


def test_weight_that_is_changed_on_its_way(changed):
    """A node between the decoded weight and the product: the codes are right, the numbers are not."""

    def edit(model):
        slots = operands(model, UP0)
        node, place = slots[0]
        two = numpy_helper.from_array(np.array(2, np.float32 if len(slots) == 1 else np.uint8), "two")
        model.graph.initializer.append(two)
        model.graph.node.append(
            helper.make_node("Mul", [node.input[place], "two"], ["doubled"], name="doubled")
        )
        node.input[place] = "doubled"
        sort(model)

    with pytest.raises(PackageError, match=f"{UP0}: .* uses other values than its codes and LUT give"):
        load_graph(changed(edit)).palettized()


def test_tables_that_give_other_symbols(changed):
    """The constant that says which indices a symbol stands for."""

    def edit(model):
        for tensor in model.graph.initializer:
            if tensor.dims == [64, 2] and tensor.raw_data:
                values = numpy_helper.to_array(tensor)
                tensor.raw_data = np.ascontiguousarray(values[:, ::-1]).tobytes()
                return
        raise AssertionError("no such table")

    with pytest.raises(PackageError, match="uses other values|does not become its rows"):
        load_graph(changed(edit)).palettized()


def test_embedding_of_other_tokens(changed):
    def edit(model):
        one = numpy_helper.from_array(np.array(1, np.int64), "one")
        model.graph.initializer.append(one)
        shifted = helper.make_node("Sub", ["input_ids", "one"], ["shifted"], name="shifted")
        replace_uses(model, "input_ids", "shifted")
        model.graph.node.insert(0, shifted)

    with pytest.raises(PackageError, match=f"{EMBEDDING}: what node .* gathers does not become its rows"):
        load_graph(changed(edit)).palettized()


@pytest.mark.parametrize("value", [-1, 1 << 20])
def test_codes_that_point_beyond_a_table(changed, value):
    """The constants that say where the table of a group starts."""

    def edit(model):
        for tensor in model.graph.initializer:
            if len(tensor.dims) == 5 and tensor.data_type == onnx.TensorProto.INT32 and tensor.raw_data:
                offsets = numpy_helper.to_array(tensor).copy()
                offsets.reshape(-1)[-1] = value if value > 0 else -(1 << 20)
                tensor.raw_data = offsets.tobytes()
                return
        raise AssertionError("no offsets")

    with pytest.raises(PackageError, match="out of bounds|beyond"):
        load_graph(changed(edit)).palettized()


def test_lut_that_is_too_short(changed):
    def edit(model):
        (lut,) = [tensor for tensor in model.graph.initializer if tensor.name == f"{UP0}.lut"]
        groups, _, entries, _ = lut.dims
        del lut.dims[:]
        lut.dims.extend([groups, 1, entries // 2, 2])

    with pytest.raises(PackageError, match=UP0):
        load_graph(changed(edit)).palettized()


def metadata(key: str, value: object):
    def edit(model):
        for entry in model.metadata_props:
            if entry.key == f"edkm_export.{key}":
                entry.value = value if isinstance(value, str) else json.dumps(value(json.loads(entry.value)))

    return edit


def without(name: str):
    return lambda found: {key: value for key, value in found.items() if key != name}


def having(name: str, value: object):
    return lambda found: {**found, name: value}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "2", "expected '1'"),
        ("runtime", "faster", "expected one of exact"),
        (
            "runtime",
            "low-memory",
            "its metadata say that its profile is low-memory, but its nodes are those of exact",
        ),
        ("runtime", "fast", "its metadata say that its profile is fast, but its nodes are those of exact"),
        ("context_length", "-5", "expected a number of positions"),
        ("context_length", "9" * 30, "expected a number of positions"),
        ("palettized", "{", "is no JSON"),
        ("palettized", "[" * 100_000, "is no JSON"),
        ("palettized", "[]", "is no object"),
        ("palettized", without(UP0), f"{UP0}: its codes are in the graph, but not in its metadata"),
        (
            "palettized",
            having("ghost", {"shape": [8, 8], "n_bits": 4}),
            "ghost: its codes are not in the graph",
        ),
        ("palettized", having(UP0, {"shape": [48, 32], "n_bits": 5}), "says 5 bits"),
        ("palettized", having(UP0, {"shape": [48, 32], "n_bits": True}), "says True bits"),
        ("palettized", having(UP0, {"shape": [48, 32], "n_bits": 4}), UP0),
        ("palettized", having(UP0, {"shape": [48, 40], "n_bits": 3}), UP0),
        ("palettized", having(UP0, {"shape": [48, 31], "n_bits": 3}), UP0),
        ("palettized", having(UP0, {"shape": [32, 48], "n_bits": 3}), UP0),
        ("palettized", having(UP0, {"shape": [1 << 40, 32], "n_bits": 3}), "its shape is"),
        ("palettized", having(UP0, {"shape": [48, -32], "n_bits": 3}), "its shape is"),
        ("palettized", having(UP0, {"shape": [], "n_bits": 3}), UP0),
        ("palettized", having(UP0, {"shape": [48], "n_bits": 3}), UP0),
        ("palettized", having(UP0, {"shape": "48x32", "n_bits": 3}), "its shape is"),
        ("palettized", having(UP0, None), "its shape is"),
        (
            "dense",
            having("model.norm.weight", [31]),
            "model.norm.weight is of shape [32], expected shape [31]",
        ),
        ("dense", having("ghost", [3]), "ghost is missing"),
        ("tied", having("lm_head.weight", 5), "tied to 5"),
    ],
)
def test_metadata_that_makes_no_sense(onnx_folder, tmp_path, key, value, message):
    folder = Path(shutil.copytree(onnx_folder("exact"), tmp_path / "changed"))
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    metadata(key, value)(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(PackageError) as caught:
        graph = load_graph(folder)
        graph.palettized()
        graph.dense()
    assert message in str(caught.value)


@pytest.mark.parametrize("profile", ["exact", "low-memory", "fast"])
def test_changed_bytes_are_noticed(onnx_folder, tmp_path, profile):
    """Each byte of the external data belongs to a tensor: a change of one changes what is read, or is refused."""
    folder = Path(shutil.copytree(onnx_folder(profile), tmp_path / "changed"))
    data = folder / "onnx" / "model.onnx_data"
    content = data.read_bytes()
    reference = load_graph(onnx_folder(profile))
    expected, dense = reference.palettized(), reference.dense()
    model = onnx.load(reference.graph.path, load_external_data=False)
    places = [external(model, tensor.name) for tensor in model.graph.initializer if tensor.external_data]
    used = [(int(each["offset"]), int(each["offset"]) + int(each["length"])) for each in places]
    for place in range(0, len(content), len(content) // 12):
        changed = bytearray(content)
        changed[place] ^= 0x11
        data.write_bytes(changed)
        try:
            graph = load_graph(folder)
            found, others = graph.palettized(), graph.dense()
        except PackageError:
            continue
        same = all(found[name].same_bits(tensor) for name, tensor in expected.items())
        same &= all(
            others[name].numpy().tobytes() == tensor.numpy().tobytes() for name, tensor in dense.items()
        )
        assert same == (not any(start <= place < end for start, end in used))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 255)), min_size=1, max_size=3))
def test_random_damage_raises_nothing_else(onnx_folder, tmp_path, flips):
    folder = tmp_path / "changed"
    if not folder.exists():
        shutil.copytree(onnx_folder("low-memory"), folder)
    content = bytearray((onnx_folder("low-memory") / "onnx" / "model.onnx").read_bytes())
    for place, mask in flips:
        content[place % len(content)] ^= mask
    (folder / "onnx" / "model.onnx").write_bytes(content)
    try:
        graph = load_graph(folder)
        graph.palettized()
        graph.dense()
    except PackageError:
        pass


def test_run(onnx_folder):
    graph = load_graph(onnx_folder("exact"))
    tokens = torch.arange(7)
    feeds = {name: torch.from_numpy(value) for name, value in batch_feeds(graph.graph, [tokens], 7).items()}
    outputs = graph.run(feeds)
    expected = hard_logits(palettized_checkpoint(3), tokens)
    torch.testing.assert_close(outputs["logits"][0], expected, atol=2e-5, rtol=2e-5)
    assert outputs["present.1.key"].shape == (1, 2, 7, 8)
    assert torch.equal(graph.run(feeds, optimization="disabled")["logits"].argmax(-1)[0], expected.argmax(-1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "input 'input_ids' is missing"),
        ({"tokens": torch.zeros(1, 7)}, "no input 'tokens'"),
        ({"input_ids": torch.zeros(1, 7)}, "input_ids is float32 [1, 7], expected int64"),
        ({"input_ids": torch.zeros(7, dtype=torch.int64)}, "input_ids is int64 [7], expected"),
        (
            {"position_ids": torch.zeros(1, 6, dtype=torch.int64)},
            "sequence_length is 6 in position_ids, but 7",
        ),
        ({"past_key_values.0.key": torch.zeros(1, 3, 0, 8)}, "expected float32 [batch_size, 2,"),
    ],
)
def test_run_refuses(onnx_folder, change, message):
    graph = load_graph(onnx_folder("exact"))
    feeds = {
        name: torch.from_numpy(value)
        for name, value in batch_feeds(graph.graph, [torch.arange(7)], 7).items()
    }
    feeds = {name: value for name, value in {**feeds, **change}.items() if value is not None}
    with pytest.raises(InputError) as caught:
        graph.run(feeds)
    assert message in str(caught.value)


@pytest.mark.parametrize("path", ["", "onnx", "onnx/model.onnx"])
def test_found_by_folder_or_file(onnx_folder, path):
    folder = onnx_folder("exact")
    if path == "onnx":
        assert load_graph(folder / path).graph.path == folder / "onnx/model.onnx"
    else:
        assert load_graph(folder / path).path == folder


def test_folder_without_model(tmp_path):
    with pytest.raises(PackageError, match="expected a folder with model.onnx or onnx/model.onnx"):
        load_graph(tmp_path)
    with pytest.raises(PackageError, match="cannot be read"):
        load_graph(tmp_path / "nothing.onnx")

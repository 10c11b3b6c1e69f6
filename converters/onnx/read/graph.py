"""A graph as it is written in model.onnx, checked before anything looks into it.

The protobuf message is only trusted to be a message: names may be no text, nodes may form a cycle, a weight may at
the same time be an input that the caller can replace. What passes is in single static assignment form, sorted, and
of the two operator sets that the exporter uses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.onnx.backend import load_onnx
from converters.onnx.read.external import ExternalData, open_regular
from converters.onnx.read.tensors import DTYPES, MAX_DIMENSION, MAX_RANK, read_tensor
from edkm_export.errors import PackageError

__all__ = ["CONTRIB", "Body", "Graph", "Node", "ValueType", "read_graph"]

CONTRIB = "com.microsoft"
"""Domain of onnxruntime's own operators."""

_STANDARD = ("", "ai.onnx")
_MAX_MODEL_BYTES = 1 << 28  # weights lie outside of it; parsing takes a multiple of this
_MAX_OPSET = 1000
_GRAPH = 5
_ATTRIBUTES = {1: "f", 2: "i", 3: "s", 4: "t", 6: "floats", 7: "ints", 8: "strings"}  # AttributeProto.type


@dataclass(frozen=True)
class ValueType:
    """Type of an input or output: dtype, and sizes; a name stands for a size that is open."""

    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype.name} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, eq=False)
class Node:
    """One operation.

    Attributes:
        name: its own.
        op: its type.
        domain: "" for the standard operators.
        inputs: value names; "" for one that is left out.
        outputs: likewise.
        attributes: int, float, bytes, list of them, or array; a `Body` of a Scan.
    """

    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def __str__(self) -> str:
        return f"node {self.name!r} ({self.op})"

    def integer(self, key: str, default: int) -> int:
        """An attribute that is a number.

        Raises:
            PackageError: it is something else.
        """
        value = self.attributes.get(key, default)
        if type(value) is not int:
            raise PackageError(f"{self}: attribute {key!r} is no integer; the model is damaged.")
        return value


@dataclass(frozen=True, eq=False)
class Body:
    """What a Scan does with each token: nodes that see its inputs alone.

    Attributes:
        nodes: sorted.
        inputs, outputs: value names.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Graph:
    """A checked graph.

    Attributes:
        path: of model.onnx.
        nodes: sorted: each uses only what earlier ones give.
        inputs: by name.
        outputs: by name.
        tensors: initializers by name, read-only.
        opsets: {domain: version}.
        metadata: `metadata_props` of the model.
        external: files beside it.
        size_bytes: of model.onnx itself.
    """

    path: Path
    nodes: tuple[Node, ...]
    inputs: Mapping[str, ValueType]
    outputs: Mapping[str, ValueType]
    tensors: Mapping[str, NDArray[Any]]
    opsets: Mapping[str, int]
    metadata: Mapping[str, str]
    external: ExternalData
    size_bytes: int

    @cached_property
    def producers(self) -> Mapping[str, Node]:
        """The node that gives a value, by value."""
        return {output: node for node in self.nodes for output in node.outputs if output}

    @cached_property
    def users(self) -> Mapping[str, tuple[Node, ...]]:
        """The nodes that take a value, by value."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found.setdefault(name, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}


def read_graph(path: str | Path) -> Graph:
    """Read and check model.onnx.

    Raises:
        PackageError: it is damaged, hostile, or not of the kind that this exporter writes.
        BackendMissingError: onnx is not installed.
    """
    path = Path(path)
    model, size_bytes = _parse(path)
    return _Checker(path, model).graph(size_bytes)


def _parse(path: Path) -> tuple[Any, int]:
    onnx = load_onnx()
    from google.protobuf.message import DecodeError

    descriptor, size = open_regular(path, "the model")
    with os.fdopen(descriptor, "rb") as file:
        if size > _MAX_MODEL_BYTES:
            raise PackageError(
                f"{path}: has {size:,} bytes without its external data; more than {_MAX_MODEL_BYTES:,} are not read."
            )
        content = file.read()
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except (DecodeError, RecursionError, ValueError) as error:
        raise PackageError(
            f"{path}: is no ONNX model, or a truncated one ({error}); export it again."
        ) from error
    return model, size


class _Checker:
    """Turns a message into a Graph, or refuses it."""

    def __init__(self, path: Path, model: Any) -> None:
        self._path = path
        self._model = model
        self._external = ExternalData(path)

    def graph(self, size_bytes: int) -> Graph:
        graph = self._model.graph
        self._refuse_extras(graph)
        opsets = self._opsets()
        tensors = dict(self._initializers(graph))
        inputs, outputs = self._interface(graph.input, "input"), self._interface(graph.output, "output")
        if both := sorted(tensors.keys() & inputs.keys()):
            self._fail(f"{both[0]!r} is an initializer and an input, so that a caller could replace it")
        nodes = tuple(self._node(node, place, opsets) for place, node in enumerate(graph.node))
        self._check_order(nodes, {*tensors, *inputs}, outputs)
        self._external.check_overlaps()
        return Graph(
            path=self._path,
            nodes=nodes,
            inputs=inputs,
            outputs=outputs,
            tensors=tensors,
            opsets=opsets,
            metadata=self._metadata(),
            external=self._external,
            size_bytes=size_bytes,
        )

    def _fail(self, what: str) -> Any:
        raise PackageError(f"{self._path}: {what}.")

    def _text(self, value: object, what: str) -> str:
        """A string field; the parser hands out bytes when they are no UTF-8."""
        if not isinstance(value, str):
            self._fail(f"{what} is {value!r:.60}, which is no text; the model is damaged")
        return str(value)

    def _refuse_extras(self, graph: Any) -> None:
        if not graph.node:
            self._fail("holds no graph; it is not an ONNX model")
        for message, field in (
            (self._model, "functions"),
            (self._model, "training_info"),
            (graph, "sparse_initializer"),
        ):
            if len(getattr(message, field)):
                self._fail(f"has {field}, which this exporter never writes; not understood")

    def _opsets(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for entry in self._model.opset_import:
            domain, version = self._text(entry.domain, "an operator domain"), int(entry.version)
            domain = "" if domain in _STANDARD else domain
            if domain not in ("", CONTRIB):
                self._fail(f"imports operators of the unknown domain {domain!r}; they could do anything")
            if domain in found or not 1 <= version <= _MAX_OPSET:
                self._fail(f"imports operator set {domain!r} twice or in the absurd version {version}")
            found[domain] = version
        if "" not in found:
            self._fail("does not import the standard operator set")
        return found

    def _metadata(self) -> dict[str, str]:
        return {
            self._text(entry.key, "a key of its metadata"): self._text(entry.value, "its metadata")
            for entry in self._model.metadata_props
        }

    def _initializers(self, graph: Any) -> Iterator[tuple[str, NDArray[Any]]]:
        seen: set[str] = set()
        for proto in graph.initializer:
            name = self._text(proto.name, "the name of an initializer")
            if not name or name in seen:
                self._fail(f"initializer {name!r} is unnamed or there twice")
            seen.add(name)
            yield name, read_tensor(proto, self._external, f"{self._path}: {name}")

    def _interface(self, values: Any, kind: str) -> dict[str, ValueType]:
        found: dict[str, ValueType] = {}
        for value in values:
            name = self._text(value.name, f"the name of an {kind}")
            if not name or name in found:
                self._fail(f"{kind} {name!r} is unnamed or there twice")
            tensor = value.type.tensor_type
            if not value.type.HasField("tensor_type") or tensor.elem_type not in DTYPES:
                self._fail(f"{kind} {name!r} is no tensor of a type that this exporter writes")
            if len(tensor.shape.dim) > MAX_RANK:
                self._fail(f"{kind} {name!r} has {len(tensor.shape.dim)} axes")
            shape = tuple(self._size(size, f"{kind} {name!r}") for size in tensor.shape.dim)
            found[name] = ValueType(DTYPES[tensor.elem_type], shape)
        return found

    def _size(self, size: Any, where: str) -> int | str:
        if not size.HasField("dim_value"):
            return self._text(size.dim_param, f"a size of {where}")
        if not 0 <= size.dim_value < MAX_DIMENSION:
            self._fail(f"{where} has the absurd size {size.dim_value}")
        return int(size.dim_value)

    def _body(self, graph: Any, where: str, opsets: Mapping[str, int]) -> Body:
        """The body of a Scan, which takes nothing from around it and holds no graph itself."""
        if len(graph.initializer) or len(graph.sparse_initializer):
            self._fail(f"{where}: its body holds weights, which this exporter never writes")
        names = [
            tuple(self._text(value.name, f"a value of {where}") for value in values)
            for values in (graph.input, graph.output)
        ]
        nodes = tuple(self._node(node, place, opsets, inner=True) for place, node in enumerate(graph.node))
        self._check_order(nodes, set(names[0]), dict.fromkeys(names[1]))
        return Body(nodes, *names)

    def _node(self, proto: Any, place: int, opsets: Mapping[str, int], *, inner: bool = False) -> Node:
        where = f"node {place}"
        name, op = self._text(proto.name, f"the name of {where}"), self._text(proto.op_type, f"op of {where}")
        domain = self._text(proto.domain, f"the domain of {where}")
        domain = "" if domain in _STANDARD else domain
        where = f"node {name!r} ({op})"
        if domain not in opsets:
            self._fail(f"{where} is of domain {domain!r}, which the model does not import")
        if not domain and not load_onnx().defs.has(op, domain):
            self._fail(f"{where}: no such standard operator")
        attributes: dict[str, Any] = {}
        for entry in proto.attribute:
            key = self._text(entry.name, f"an attribute of {where}")
            if (op, key, entry.type) == ("Scan", "body", _GRAPH) and not inner and not domain:
                attributes[key] = self._body(entry.g, where, opsets)
                continue
            field = _ATTRIBUTES.get(entry.type)
            if field is None or entry.ref_attr_name or key in attributes:
                self._fail(
                    f"{where}: attribute {key!r} is there twice, or holds a graph or something unknown"
                )
            value = getattr(entry, str(field))
            if field == "t":
                value = read_tensor(value, self._external, f"{self._path}: {where}: {key}")
            attributes[key] = value if field in ("f", "i", "s", "t") else list(value)
        if not proto.output or not proto.output[0]:
            self._fail(f"{where} has no result")
        return Node(
            name=name,
            op=op,
            domain=domain,
            inputs=tuple(self._text(value, f"an input of {where}") for value in proto.input),
            outputs=tuple(self._text(value, f"an output of {where}") for value in proto.output),
            attributes=attributes,
        )

    def _check_order(self, nodes: tuple[Node, ...], known: set[str], outputs: Mapping[str, Any]) -> None:
        """Each value is given once, before it is used; so there is no cycle."""
        known = {"", *known}
        for node in nodes:
            for value in node.inputs:
                if value not in known:
                    self._fail(
                        f"{node} uses {value!r}, which nothing before it gives: the graph has a cycle, "
                        "is not sorted, or is incomplete"
                    )
            for value in node.outputs:
                if value and value in known:
                    self._fail(f"{node} gives {value!r}, which is there already")
                known.add(value)
        for value in outputs:
            if value not in known:
                self._fail(f"output {value!r} is given by nothing")

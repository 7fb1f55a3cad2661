"""From a float ONNX graph to one that computes in 8-bit integers, by ONNX Runtime's own quantizer.

Convolutions are quantised statically, with ranges from calibration data: sought anew in each run they are several times
slower than in float. With them go the ReLUs, sums of two and max pooling between them. Products with constant matrices
are quantised dynamically, with ranges of each run: what transformers multiply has outliers, for which one range for all
inputs is too coarse. Tables of embeddings are stored in 8 bits, and what is looked up is made float again.
`docs/quantization.md` has the figures. Whatever else there is stays in float.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lrcompile.errors import VerificationError, first_line

KINDS = (STATIC, DYNAMIC, TABLES) = ("convolutions", "products", "embeddings")
Feeds = Mapping[str, np.ndarray]
_BESIDE = ("Relu", "Clip", "Add", "MaxPool")
_OWN = " of "  # between the name of a table and that of the product that has got one of its own


@dataclass(frozen=True)
class Quantizable:
    """A node with a constant float weight: its name, its kind, which says how it is quantised, and its layer's name."""

    node: str
    kind: str
    layer: str


def quantizable(model: onnx.ModelProto) -> tuple[Quantizable, ...]:
    """The nodes that 8-bit integers make faster or smaller, in graph order.

    Convolutions, products with constant matrices, and tables that nothing else reads, or only such products do, which
    belong to the same layer: see `untied`.
    """
    model = untied(model, shared_tables(model))
    floats = {t.name: len(t.dims) for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    uses = Counter(name for node in model.graph.node for name in node.input)
    found = []
    for node in model.graph.node:
        constant = tuple(floats.get(name, 0) for name in node.input[:2])  # axes of the first two inputs, 0: computed
        if node.op_type == "Gather" and constant == (2, 0) and uses[node.input[0]] == 1 and not _axis(node):
            kind, weight = TABLES, node.input[0]
        elif node.op_type == "Conv" and not constant[0] and constant[1]:
            kind, weight = STATIC, node.input[1]
        elif constant == (0, 2) and (node.op_type == "MatMul" or (node.op_type == "Gemm" and _is_plain(node))):
            kind, weight = DYNAMIC, node.input[1]
        else:
            continue
        found.append(Quantizable(node.name, kind, _layer(weight)))
    return tuple(found)


def _layer(weight: str) -> str:
    return weight.partition(_OWN)[0].removesuffix(".weight")


def shared_tables(model: onnx.ModelProto) -> frozenset[str]:
    """The tables of one lookup that products read too, and nothing else, such as those of tied heads."""
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            readers[name].append((node, place))
    results = {port.name for port in model.graph.output}

    def multiplies(node: onnx.NodeProto, place: int) -> bool:
        if _turns(node):
            after = readers[node.output[0]]
            return node.output[0] not in results and all(multiplies(*reader) for reader in after)
        return place == 1 and (node.op_type == "MatMul" or (node.op_type == "Gemm" and _is_plain(node)))

    found = set()
    for tensor in model.graph.initializer:
        mine = readers[tensor.name]
        others = [reader for reader in mine if reader[0].op_type != "Gather" or _axis(reader[0])]
        is_table = tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2
        if is_table and len(mine) - len(others) == 1 and others and all(multiplies(*reader) for reader in others):
            found.add(tensor.name)
    return frozenset(found)


def untied(model: onnx.ModelProto, tables: Collection[str]) -> onnx.ModelProto:
    """The model with a matrix of its own for each product that reads one of the tables, turned where it was."""
    if not tables:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name in tables}
    turned = {node.output[0]: node.input[0] for node in graph.node if _turns(node) and node.input[0] in tables}
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm") or turned.get(node.input[1], node.input[1]) not in tables:
            continue
        table = turned.get(node.input[1], node.input[1])
        value = values[table].T if node.input[1] in turned else values[table]
        node.input[1] = f"{table}{_OWN}{node.name}"
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), node.input[1]))
    kept = [node for node in graph.node if not (_turns(node) and node.input[0] in tables)]
    del graph.node[:]
    graph.node.extend(kept)
    return result


def _turns(node: onnx.NodeProto) -> bool:
    """Whether a node transposes a matrix."""
    return node.op_type == "Transpose" and [list(attribute.ints) for attribute in node.attribute] == [[1, 0]]


def _axis(gather: onnx.NodeProto) -> int:
    """The axis that is looked up along."""
    return next((attribute.i for attribute in gather.attribute if attribute.name == "axis"), 0)


def _is_plain(gemm: onnx.NodeProto) -> bool:
    """Whether a Gemm is a product and a sum, which the quantizer takes apart."""
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in gemm.attribute}
    return given.get("alpha", 1.0) == 1.0 and given.get("beta", 1.0) == 1.0 and not given.get("transA", 0)


class Quantizer:
    """Quantises parts of one model; ranges are calibrated once. Use it as a context: its files are gone afterwards."""

    def __init__(self, path: Path, feeds: Sequence[Feeds]) -> None:
        self.path = path
        self.feeds = feeds
        model = onnx.load(path)
        self.nodes = quantizable(model)
        self._shared = shared_tables(model)
        self._folder = tempfile.TemporaryDirectory(prefix="lrcompile-")

    def __enter__(self) -> Quantizer:
        return self

    def __exit__(self, *raised: object) -> None:
        self._folder.cleanup()

    def quantized(self, nodes: Collection[Quantizable], narrow: Collection[str] = ()) -> bytes:
        """The model with these nodes in 8-bit integers, the same bytes for the same nodes.

        The weights of the kinds in `narrow` have 7 bits.

        Raises:
            VerificationError: the quantizer fails.
        """
        chosen = set(nodes)
        static, dynamic, tables = (
            [node.node for node in self.nodes if node in chosen and node.kind == kind] for kind in KINDS
        )
        with _quiet():
            try:
                path = self._untied({node.layer for node in chosen})
                if static:
                    path = self._static(path, static, STATIC in narrow)
                if dynamic or tables:
                    path = self._dynamic(path, dynamic, tables, DYNAMIC in narrow)
            except Exception as error:  # whatever the quantizer raises
                raise VerificationError(
                    f"ONNX Runtime's quantizer cannot quantise the model: {type(error).__name__}: {first_line(error)}; "
                    "nothing is written; compile without --quantize"
                ) from error
        return _stripped(onnx.load(path)).SerializeToString(deterministic=True)

    def _untied(self, layers: Collection[str]) -> Path:
        """The model in which what is quantised of a shared table is read by nothing else."""
        tables = [table for table in self._shared if _layer(table) in layers]
        if not tables:
            return self.path
        out = Path(self._folder.name) / "untied.onnx"
        onnx.save(untied(onnx.load(self.path), tables), out)
        return out

    def _static(self, path: Path, names: list[str], narrow: bool) -> Path:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        out = Path(self._folder.name) / "static.onnx"
        beside = _in_integers(onnx.load(path), names)
        quantize_static(
            path, out, Reader(self.feeds),
            quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=narrow,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", *_BESIDE], nodes_to_quantize=[*names, *beside],
            calibration_cache_path=Path(self._folder.name) / "ranges.json",
        )  # fmt: skip
        return out

    def _dynamic(self, path: Path, products: list[str], tables: list[str], narrow: bool) -> Path:
        """Both in one go, as a product can take what was looked up as it is; tables have 8 bits in any case."""
        from onnxruntime.quantization import QuantType, quantize_dynamic

        out = Path(self._folder.name) / "dynamic.onnx"
        taken_apart = [f"{name}_MatMul" for name in products]  # what the quantizer calls the product of a Gemm
        kinds = ["MatMul"] * bool(products) + ["Gather"] * bool(tables)
        quantize_dynamic(
            path, out, op_types_to_quantize=kinds, nodes_to_quantize=[*products, *taken_apart, *tables],
            per_channel=True, reduce_range=narrow, weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
        return out


def in_int8(model: bytes, feeds: Feeds) -> bytes:
    """A model with all that can be in 8-bit integers: what it takes of time and memory, not what it costs.

    Raises:
        VerificationError: the quantizer fails.
    """
    with tempfile.TemporaryDirectory(prefix="lrcompile-") as folder:
        path = Path(folder) / "float.onnx"
        path.write_bytes(model)
        with Quantizer(path, [feeds]) as quantizer:
            return quantizer.quantized(quantizer.nodes) if quantizer.nodes else model


def stored_bytes(model: bytes) -> int:
    """Bytes of the weights that a model stores."""
    tensors = onnx.load_from_string(model).graph.initializer
    return sum(math.prod(t.dims) * helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in tensors)


class Reader:
    """Calibration data, by the names of a file's inputs, as the quantizer reads them."""

    def __init__(self, feeds: Iterable[Feeds]) -> None:
        self._left = iter(feeds)

    def get_next(self) -> Feeds | None:
        """The next batch, None after the last."""
        return next(self._left, None)


def _in_integers(model: onnx.ModelProto, convolutions: Collection[str]) -> list[str]:
    """The nodes beside some convolutions that take integers as these give them, and give integers.

    A ReLU is what the range of an unsigned output does by itself; sums of two, as those of residual blocks, and the
    largest of windows are of integers where all that enters them is.
    """
    zeros = {t.name for t in model.graph.initializer if not any(t.dims) and not numpy_helper.to_array(t).any()}
    values: set[str] = set()
    found = []
    for node in model.graph.node:
        if node.op_type == "Conv":
            values.update(node.output[:1] if node.name in convolutions else ())
            continue
        is_relu = node.op_type == "Relu" or (node.op_type == "Clip" and len(node.input) > 1 and node.input[1] in zeros)
        entering = node.input[:1] if is_relu or node.op_type == "MaxPool" else node.input
        is_taken = is_relu or node.op_type == "Add" or (node.op_type == "MaxPool" and len(node.output) == 1)
        if is_taken and values.issuperset(entering):
            values.add(node.output[0])
            found.append(node.name)
    return found


def _stripped(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without what the quantizer says of itself."""
    model.producer_name, model.producer_version = "lrcompile", ""
    del model.metadata_props[:]
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the quantizer, which prints and writes to the root logger."""
    before, sink = logging.root.manager.disable, logging.NullHandler()
    logging.root.addHandler(sink)  # or the quantizer's first word would give the caller's logger a handler
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        logging.root.removeHandler(sink)

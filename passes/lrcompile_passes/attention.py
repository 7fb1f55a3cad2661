"""Recognises attention in a lifted graph: which layer computes q, k and v, and which of its rows make which head.

Models lay heads out in many ways: three layers or one, `chunk`, `unbind` of a reshape, `nn.MultiheadAttention`'s
merged axes. Instead of a pattern for each, the operations between a layer and `scaled_dot_product_attention` are run
on the positions of the layer's output as integers. What comes out says where every value came from, so whatever only
moves values is understood, and what is not understood is refused, never guessed.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from lrcompile.graph.graph import Graph, Site, aten, packet_of, shape
from lrcompile_passes.positions import (
    NotUnderstoodError,
    followed,
    is_move,
    is_scale,
    moves_to,
    name_of,
    shape_with,
    sizes_of,
    symbols_of,
    with_sizes,
)

Role = Literal["query", "key", "value"]

ROLES: tuple[Role, Role, Role] = ("query", "key", "value")

SDPA = aten.scaled_dot_product_attention.default
MOST_NODES = 200  # between a layer and its attention

_POINTWISE = frozenset((aten.neg, aten.contiguous, aten.clone, aten.alias, aten.detach, aten.to, aten._to_copy))
_BROADCAST = frozenset((aten.mul, aten.add, aten.sub, aten.div))
_ALONG_ONE_AXIS = {
    aten.slice: 1, aten.select: 1, aten.split: 2, aten.split_with_sizes: 2, aten.chunk: 2, aten.unbind: 1,
    aten.cat: 1, aten.stack: 1, aten.unsqueeze: 1, aten.squeeze: 1, aten.flatten: 1, aten.unflatten: 1,
}  # fmt: skip
_NORMS = frozenset((
    "pow", "mean", "rsqrt", "rms_norm", "layer_norm", "native_layer_norm", "linalg_vector_norm", "norm", "var", "square"
))  # fmt: skip


@dataclass(frozen=True, eq=False)
class Projection:
    """How a layer's output becomes the queries, keys or values of one attention.

    `rows` [heads × head size] are the layer's output features of each head it computes; head o of the attention
    reads head `reads[o]` of these. The layer's output is [batch, length, features] in memory, or with
    `sequence_first` [length, batch, features]. `body` are the operations on the heads one by one, as rotary position
    embeddings, from `base` with its heads on axis `head_axis`; `scales` and `late_scales` are products with a constant
    before and after it. `inside` are all nodes from the layer to the attention, both left out.
    """

    site: Site
    rows: Tensor
    reads: tuple[int, ...]
    length: int
    sequence_first: bool
    scales: tuple[fx.Node, ...]
    base: fx.Node | None
    head_axis: int
    body: tuple[fx.Node, ...]
    late_scales: tuple[fx.Node, ...]
    inside: frozenset[fx.Node]

    @property
    def heads(self) -> int:
        """The number of heads that the layer computes."""
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention of `heads` heads; `output` is the layer after it, where only moved values lie between.

    `columns` [heads × head size] are the input features of that layer that each head fills.
    """

    node: fx.Node
    heads: int
    query: Projection
    key: Projection
    value: Projection
    output: Site | None
    columns: Tensor | None

    @property
    def parts(self) -> tuple[Projection, Projection, Projection]:
        """Query, key and value."""
        return self.query, self.key, self.value


def attentions(graph: Graph) -> Iterator[tuple[str, Attention | str]]:
    """(site to name, what was understood or why nothing was) of every attention, in execution order."""
    for node in graph.nodes:
        if node.target is not SDPA:
            continue
        try:
            attention = recognise(graph, node)
        except NotUnderstoodError as reason:
            yield _nearest_layer(graph, node), str(reason)
        else:
            yield attention.query.site.path, attention


def recognise(graph: Graph, node: fx.Node) -> Attention:
    """The attention that ends in a `scaled_dot_product_attention` node.

    Raises:
        NotUnderstoodError: with the reason.
    """
    options = arguments(node)
    queries, keys, values = (options[name] for name in ("query", "key", "value"))
    if any(len(shape(x)) != 4 for x in (queries, keys, values)):
        raise NotUnderstoodError("attention over tensors that are not [batch, heads, length, size]")
    heads = shape(queries)[1]
    if any(0 in shape(x) for x in (queries, keys, values)):
        raise NotUnderstoodError("attention over tensors that hold nothing")
    if heads < 2:
        raise NotUnderstoodError("attention has one head")
    _check_mask(options["attn_mask"])
    if options["dropout_p"]:
        raise NotUnderstoodError("attention drops weights at random")
    if any(heads % shape(x)[1] for x in (keys, values)):
        raise NotUnderstoodError(f"{heads} query heads do not divide among {shape(keys)[1]} key heads")
    if shape(keys)[1] != shape(values)[1]:
        raise NotUnderstoodError(f"{shape(keys)[1]} key heads but {shape(values)[1]} value heads")
    query, key, value = (with_sizes(_projection, graph, x, heads) for x in (queries, keys, values))
    _check_alone(node, (query, key, value))
    output, columns = with_sizes(_output, graph, node) or (None, None)
    return Attention(node, heads, query, key, value, output, columns)


def computed_by(graph: Graph, node: fx.Node, paths: Container[str]) -> dict[Role, Projection]:
    """Of an attention that was recognised before, what the layers at some paths compute.

    An extract of the graph may lack the other layers, and other rewrites may have taken them since.
    """
    found: dict[Role, Projection] = {}
    for role, value in zip(ROLES, node.args, strict=False):
        try:
            part = with_sizes(_projection, graph, value, shape(node)[1])
        except NotUnderstoodError:
            continue
        if part.site.path in paths:
            found[role] = part
    return found


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator's call by name, with the schema's defaults for those not given."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    return {argument.name: argument.default_value for argument in schema} | given | dict(node.kwargs)


def _check_mask(mask: Any) -> None:
    if not isinstance(mask, fx.Node):
        return
    sizes = shape(mask)
    if len(sizes) > 4:
        raise NotUnderstoodError(f"mask of rank {len(sizes)}")
    if len(sizes) > 2 and sizes[-3] != 1:
        raise NotUnderstoodError("the mask has an axis of heads, which may differ, as a relative position bias")


def _check_alone(node: fx.Node, parts: Sequence[Projection]) -> None:
    """Every row of the layers is read by this attention, once, and nothing else reads what lies between."""
    inside = frozenset[fx.Node]().union(*(part.inside for part in parts), (node,))
    rows: dict[str, list[Tensor]] = {}
    for part in parts:
        if len(part.site.nodes) > 1:
            raise NotUnderstoodError(f"{part.site.path} is called at {len(part.site.nodes)} sites")
        for read in (*part.site.nodes, *part.inside):
            if any(user not in inside for user in read.users):
                raise NotUnderstoodError(f"{part.site.path} is read outside attention too, as for a cache of keys")
        rows.setdefault(part.site.path, []).append(part.rows.flatten())
    for part in parts:
        read_rows = torch.cat(rows[part.site.path]).sort().values
        if read_rows.tolist() != list(range(_features(part.site))):
            raise NotUnderstoodError(f"heads do not read every row of {part.site.path} once")


def _features(site: Site) -> int:
    return int(site.module.weight.shape[0])  # type: ignore[union-attr, misc, index]


def _projection(graph: Graph, value: fx.Node, heads: int, samples: int | None) -> Projection:
    """How one input of attention is computed."""
    end, tail = moves_to(value)
    body: list[fx.Node] = []
    base = None if _is_linear(graph, end) else end
    source, moves = end, tail
    if base is not None:
        base, body = _body(graph, end)
        source, moves = moves_to(base)
    site = graph.site(str(source.target))
    symbols = symbols_of(source, samples)
    if not all(re.fullmatch(r"\d+", size) for size in sizes_of(value)[1:]):
        raise NotUnderstoodError("the sequence length is open")
    placed = followed(source, moves, symbols)
    if placed.dim() != 4:
        raise NotUnderstoodError(f"what is read of {source.name} is of rank {placed.dim()}, not heads of rank 4")
    head_axis, reads_base = 1, None
    if base is not None:
        head_axis, reads_base = _tail(end, tail, symbols)
        if head_axis == 2:
            placed = placed.transpose(1, 2)
        if shape(base)[head_axis] != shape(end)[head_axis]:
            raise NotUnderstoodError(f"{end.name} changes the number of heads")
    rows, sequence_first = _layout(placed, _features(site))
    if placed.shape[0] * placed.shape[2] * _features(site) != math.prod(shape_with(source, symbols)):
        raise NotUnderstoodError("only some positions are read")
    unique, reads = _unique(rows)
    if reads_base is not None:
        if len(unique) != len(rows):
            raise NotUnderstoodError(f"heads are repeated before {end.name}")
        reads = [reads[i] for i in reads_base]
    repeat = heads // len(reads)
    _check_body(body, base, head_axis)
    after = tail if base is not None else []
    return Projection(
        site=site,
        rows=unique,
        reads=tuple(reads[o // repeat] for o in range(heads)),
        length=int(shape(value)[2]),
        sequence_first=sequence_first,
        scales=tuple(filter(is_scale, moves)),
        base=base,
        head_axis=head_axis,
        body=tuple(body),
        late_scales=tuple(filter(is_scale, after)),
        inside=frozenset([*moves, *body, *after]),
    )


def _is_linear(graph: Graph, node: fx.Node) -> bool:
    return isinstance(graph.module(node), nn.Linear)


def _layout(placed: Tensor, features: int) -> tuple[Tensor, bool]:
    """(rows [heads × size], whether the sequence is the first axis) from positions [batch, heads, length, size]."""
    if placed.dim() != 4:
        raise NotUnderstoodError(f"heads are of rank {placed.dim()} where rotary embeddings begin")
    rows, tokens = placed % features, placed // features
    batch, _, length, _ = placed.shape
    if not (torch.equal(rows, rows[:1, :, :1].expand_as(rows)) and _same_tokens(tokens)):
        raise NotUnderstoodError("features and positions are mixed before attention")
    batch_first = torch.arange(batch * length, device="cpu").reshape(batch, length)
    sequence_first = torch.arange(batch * length, device="cpu").reshape(length, batch).T
    if torch.equal(tokens[:, 0, :, 0], batch_first):
        return rows[0, :, 0], False
    if torch.equal(tokens[:, 0, :, 0], sequence_first):
        return rows[0, :, 0], True
    raise NotUnderstoodError("positions are rearranged before attention")


def _same_tokens(tokens: Tensor) -> bool:
    return torch.equal(tokens, tokens[:, :1, :, :1].expand_as(tokens))


def _unique(rows: Tensor) -> tuple[Tensor, list[int]]:
    """The different heads in order of appearance, and for each head which of them it is."""
    found: dict[tuple[int, ...], int] = {}
    reads = [found.setdefault(tuple(head), len(found)) for head in rows.tolist()]
    return torch.tensor(list(found), dtype=torch.int64, device="cpu"), reads


def _tail(end: fx.Node, tail: Sequence[fx.Node], symbols: Mapping[str, int]) -> tuple[int, list[int]]:
    """(axis of heads in `end`'s output, which of them each head of the attention reads)."""
    sizes = shape_with(end, symbols)
    placed = followed(end, tail, symbols)
    if len(sizes) != 4 or placed.dim() != 4:
        raise NotUnderstoodError(f"{end.name} is of rank {len(sizes)}, not [batch, heads, length, size]")
    batch, _, length, size = placed.shape
    read = torch.unravel_index(placed, sizes)
    b, position, feature = (
        torch.arange(n, device="cpu").reshape([-1 if i == axis else 1 for i in range(4)])
        for axis, n in ((0, batch), (2, length), (3, size))
    )
    for axis in (1, 2):
        kept = ((0, b), (3 - axis, position), (3, feature))
        heads = read[axis]
        same = torch.equal(heads, heads[:1, :, :1, :1].expand_as(heads))
        if same and all(torch.equal(read[i], expected.expand_as(placed)) for i, expected in kept):
            return axis, heads[0, :, 0, 0].tolist()
    raise NotUnderstoodError(f"what follows {end.name} rearranges more than heads")


def _body(graph: Graph, end: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """(where the heads enter, the operations on them up to `end`) for an input that is not just moved."""
    ancestors, layers = _ancestors(graph, end)
    cone: dict[fx.Node, None] = dict.fromkeys(layers)
    for node in graph.nodes:
        if node in ancestors and any(source in cone for source in node.all_input_nodes):
            cone[node] = None
    modules = [type(graph.module(node)).__name__ for node in cone if node.op == "call_module" and node not in layers]
    if any("Norm" in name for name in modules) or any(name_of(node) in _NORMS for node in cone):
        raise NotUnderstoodError("queries or keys are normalised (QK-norm): an average would go through it")
    if modules:
        raise NotUnderstoodError(f"{modules[0]} between the layer and attention is not understood")
    if len(layers) != 1:
        what = "no linear layer computes" if not layers else f"{len(layers)} linear layers compute"
        raise NotUnderstoodError(f"{what} what attention reads from {end.name}")
    nodes = list(cone)
    open_until, entry = 0, None
    place = {node: i for i, node in enumerate(nodes)}
    for i, node in enumerate(nodes[:-1]):
        if i >= open_until and moves_to(node)[0] in layers:
            entry = i
        open_until = max([open_until, *(place[user] for user in node.users if user in place)])
    if entry is None or nodes[entry] in layers:
        raise NotUnderstoodError(f"{name_of(end)} before the heads are apart")
    return nodes[entry], nodes[entry + 1 :]


def _ancestors(graph: Graph, end: fx.Node) -> tuple[set[fx.Node], list[fx.Node]]:
    """What leads to a node, up to linear layers and inputs; and these layers."""
    seen: set[fx.Node] = set()
    layers: list[fx.Node] = []
    stack = [end]
    while stack:
        node = stack.pop()
        if node in seen or not isinstance(node.meta.get("val"), Tensor | list | tuple):
            continue
        seen.add(node)
        if len(seen) > MOST_NODES:
            raise NotUnderstoodError(f"more than {MOST_NODES} operations lead to {end.name}")
        if _is_linear(graph, node):
            layers.append(node)
            continue
        stack.extend(node.all_input_nodes)
    return seen, layers


def _check_body(body: Sequence[fx.Node], base: fx.Node | None, axis: int) -> None:
    """Each operation must do the same to every head, and to no two heads at once."""
    mine = {base, *body}
    for node in body:
        if not _is_by_head(node, mine, axis):
            raise NotUnderstoodError(f"{name_of(node)} between the layer and attention is not understood")


def _is_by_head(node: fx.Node, mine: set[fx.Node | None], axis: int) -> bool:
    packet = packet_of(node)
    if node.target is operator.getitem or packet in _POINTWISE:
        return True
    if packet in _BROADCAST:
        operands = [x for x in (*node.args, *node.kwargs.values()) if isinstance(x, fx.Node)]
        own = [shape(x) for x in operands if x in mine]
        if any(len(sizes) != len(shape(node)) or sizes[axis] != shape(node)[axis] for sizes in own):
            return False
        return all(_broadcasts(x, shape(node), axis) for x in operands if x not in mine)
    first: Any = node.args[0] if node.args else None
    sources = list(first) if isinstance(first, list | tuple) else [first]
    if not all(source in mine for source in sources) or any(
        x not in mine for x in node.all_input_nodes if isinstance(x.meta.get("val"), Tensor)
    ):
        return False
    before = shape(sources[0])
    if packet in (aten.reshape, aten.view):
        return shape(node)[: axis + 1] == before[: axis + 1] and isinstance(node.args[1][axis], int)  # type: ignore[index]
    if packet not in _ALONG_ONE_AXIS:
        return False
    along: Any = node.args[_ALONG_ONE_AXIS[packet]] if len(node.args) > _ALONG_ONE_AXIS[packet] else 0
    rank = len(before) + (packet in (aten.stack, aten.unsqueeze))
    return isinstance(along, int) and along % rank > axis


def _broadcasts(operand: fx.Node, result: tuple[int, ...], axis: int) -> bool:
    """Whether a tensor from elsewhere is the same for every head."""
    sizes = shape(operand)
    place = axis - (len(result) - len(sizes))
    return place < 0 or sizes[place] == 1


def _output(graph: Graph, node: fx.Node, samples: int | None) -> tuple[Site, Tensor] | None:
    """The layer that reads the attention's output and nothing else of it, with each head's input features."""
    chain: list[fx.Node] = []
    value = node
    while len(value.users) == 1:
        value = next(iter(value.users))
        if not is_move(value):
            break
        chain.append(value)
    if not _is_linear(graph, value) or not chain or len(value.all_input_nodes) != 1:
        return None
    site = graph.site(str(value.target))
    if len(site.nodes) > 1:
        return None
    symbols = symbols_of(node, samples)
    try:
        placed = followed(node, chain, symbols)
        batch, heads, length, size = shape_with(node, symbols)
    except NotUnderstoodError:
        return None
    features = placed.shape[-1]
    placed = placed.reshape(-1, features)
    head = placed // (length * size) % heads
    feature = placed % size
    if len(placed) != batch * length or features != heads * size:
        return None
    if not (torch.equal(head, head[:1].expand_as(head)) and torch.equal(feature, feature[:1].expand_as(feature))):
        return None
    columns = torch.empty(heads, size, dtype=torch.int64, device="cpu")
    columns[head[0], feature[0]] = torch.arange(features, device="cpu")
    return site, columns


def _nearest_layer(graph: Graph, node: fx.Node) -> str:
    """A layer on the way to an attention's queries, which the decision table shows; else the node's own name."""
    value: Any = node.args[0]
    for _ in range(MOST_NODES):
        if _is_linear(graph, value):
            return str(value.target)
        tensors = [source for source in value.all_input_nodes if isinstance(source.meta.get("val"), Tensor | list)]
        if not tensors:
            break
        value = tensors[0]
    return node.name

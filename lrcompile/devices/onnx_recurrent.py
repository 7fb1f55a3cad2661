"""How recurrent layers are written in ONNX: as `torch.onnx.export(dynamo=True)` writes them, one operator a layer.

Weights stand as they are; ONNX has the gates in another order, which changes no time.
"""

from __future__ import annotations

from torch import fx

from lrcompile.devices.onnx_graph import Arguments, Builder, UnsupportedRegion, tensor_of


def lower_lstm(b: Builder, node: fx.Node, a: Arguments) -> list[str]:
    """An LSTM: its values, and the last hidden and cell state."""
    return _recurrent(b, node, a, "LSTM", list(a["hx"]))


def lower_gru(b: Builder, node: fx.Node, a: Arguments) -> list[str]:
    """A GRU: its values, and the last hidden state."""
    return _recurrent(b, node, a, "GRU", [a["hx"]])


def _recurrent(b: Builder, node: fx.Node, a: Arguments, op: str, states: list[fx.Node]) -> list[str]:
    if not a["has_biases"]:
        raise UnsupportedRegion(node, f"{op} without biases")
    directions = 2 if a["bidirectional"] else 1
    hidden = int(tensor_of(states[0]).shape[-1])
    steps, batch = (int(size) for size in tensor_of(a["input"]).shape[:2])
    x = b.name(a["input"], node)
    if a["batch_first"]:
        steps, batch = batch, steps
        x = b.emit("Transpose", x, perm=[1, 0, 2])
    names, weights = [b.name(state, node) for state in states], [b.name(w, node) for w in a["params"]]
    last: list[list[str]] = [[] for _ in states]
    options = {"linear_before_reset": 1} if op == "GRU" else {}
    for layer in range(int(a["num_layers"])):
        first = 4 * directions * layer
        sides = [weights[first + 4 * i : first + 4 * i + 4] for i in range(directions)]
        into, back = (_stacked(b, node, [side[i] for side in sides]) for i in (0, 1))
        biases = _stacked(b, node, [b.emit("Concat", side[2], side[3], axis=0) for side in sides])
        begin, end = directions * layer, directions * (layer + 1)
        axis = b.integers([0], node)
        starts = [b.emit("Slice", name, b.integers([begin], node), b.integers([end], node), axis) for name in names]
        y, *ends = b.emit_many(
            op, [x, into, back, biases, "", *starts], 1 + len(states), hidden_size=hidden,
            direction="bidirectional" if directions == 2 else "forward", **options,
        )  # fmt: skip
        for found, name in zip(last, ends, strict=True):
            found.append(name)
        y = b.emit("Transpose", y, perm=[0, 2, 1, 3])
        x = b.emit("Reshape", y, b.integers([steps, batch, directions * hidden], node), allowzero=0)
    if a["batch_first"]:
        x = b.emit("Transpose", x, perm=[1, 0, 2])
    return [x, *(b.emit("Concat", *found, axis=0) if len(found) > 1 else found[0] for found in last)]


def _stacked(b: Builder, node: fx.Node, names: list[str]) -> str:
    """Tensors along a new first axis."""
    axis = b.integers([0], node)
    parts = [b.emit("Unsqueeze", name, axis) for name in names]
    return b.emit("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]

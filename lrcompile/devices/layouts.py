"""What a device runs for a graph, with what its runtime adds where values are laid out anew or given another shape.

ONNX Runtime on x86 computes convolutions of images in blocks of channels. They hand blocks to each other, through
whatever goes over values one by one. All else reads and writes values as they are: between the two they are
copied (ReorderInput and ReorderOutput). So a split to a rank below a block costs one more copy, and so does one to a
rank that does not come in fours. Which operations do without was read off graphs that ONNX Runtime 1.32 optimises. What
enters or leaves a graph is not counted: a part of a model does not say how it comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from lrcompile.devices import mlas
from lrcompile.devices.device import Device
from lrcompile.devices.fusion import constants, describe_all
from lrcompile.graph.graph import packet_of, submodule
from lrcompile.graph.op import OpDesc

aten = torch.ops.aten
_SHAPES = (aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze)
_TRANSPOSES = (aten.transpose, aten.permute)
_PADDING = (aten.pad, aten.constant_pad_nd)
_ONE_BY_ONE = {  # over values, so that they may lie in blocks
    getattr(aten, name)
    for name in ("relu", "relu6", "hardtanh", "clamp", "clamp_min", "leaky_relu", "sigmoid", "tanh", "hardsigmoid",
                 "hardswish", "silu", "gelu", "add", "mul", "max_pool2d", "avg_pool2d", "upsample_nearest2d",
                 "upsample_bilinear2d", "dropout")
}  # fmt: skip


def operations_on(device: Device, gm: fx.GraphModule, *, training: bool = False) -> dict[str, OpDesc]:
    """The operations that a device runs for a graph, by name: fused, written out and laid out anew as its runtime does.

    A backward pass needs all that is computed, so that nothing is fused in training.
    """
    found = describe_all(gm, frozenset() if training else device.fuses, device.lacks)
    if "plain_images" in device.lacks and not training:
        found |= laid_out_anew(gm, found, device.alignment_conv["fp32"])
    if "free_views" in device.lacks and not training:
        found |= {node.name: replace(found[node.name], kind="movement") for node in _shaped_anew(gm, found)}
    return found


def laid_out_anew(gm: fx.GraphModule, ops: Mapping[str, OpDesc], block: int) -> dict[str, OpDesc]:
    """The copies between values as they are and in blocks of so many channels: one for all that read a value so."""
    in_blocks: dict[fx.Node, bool] = {}  # of values that are known to lie so or not
    found: dict[str, OpDesc] = {}
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_module") or node.name not in ops:
            continue
        maps = [source for source in node.all_input_nodes if _is_map(source)]
        shape = ops[node.name].conv
        blocks = shape is not None and ops[node.name].dtype == "fp32" and not mlas.runs_unfolded(shape, block)
        reads_blocks = blocks and not _reads_few(ops[node.name], block)
        is_padding = packet_of(node) in _PADDING and ops[node.name].kind == "view"  # which a convolution takes in
        if shape is None and (is_padding or _goes_one_by_one(gm, node, block)):
            known = [in_blocks[source] for source in maps if source in in_blocks]
            blocks = reads_blocks = bool(known) and all(known)
            if not known:
                continue
        for source in maps:
            if in_blocks.get(source, reads_blocks) != reads_blocks:
                found[f"{source.name}.{'blocks' if reads_blocks else 'plain'}"] = _copy(source, block)
        if _is_map(node):
            in_blocks[node] = blocks
    return found


def _reads_few(op: OpDesc, block: int) -> bool:
    """Whether a convolution in blocks reads its channels one after the other, as they are fewer than a block."""
    return op.conv is not None and op.conv.groups == 1 and op.conv.channels_in < block


def _is_map(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 4 and value.dtype == torch.float32 and node.op != "get_attr"


def _goes_one_by_one(gm: fx.GraphModule, node: fx.Node, block: int) -> bool:
    """Whether a node takes values in blocks as well."""
    if node.op == "call_module":
        return isinstance(submodule(gm, node.target), nn.BatchNorm2d)
    packet = packet_of(node)
    if packet is aten.cat:
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return axis in (1, -3) and all(source.meta["val"].shape[1] % block == 0 for source in node.all_input_nodes)
    shapes = {tuple(source.meta["val"].shape) for source in node.all_input_nodes if _is_map(source)}
    if packet in (aten.add, aten.mul):  # of two maps alike
        return len(node.all_input_nodes) == 2 and len(shapes) == 1
    return packet in _ONE_BY_ONE


def _copy(node: fx.Node, block: int) -> OpDesc:
    """Of a value from or to blocks, of which the last is filled up."""
    value: Tensor = node.meta["val"]
    channels = value.shape[1]
    elements = value.numel() + value.numel() // max(1, channels) * mlas.padded(channels, block)
    moved = value.element_size() * elements
    return OpDesc("movement", "fp32", 0.0, 0.0, moved, label="reorder")


def _shaped_anew(gm: fx.GraphModule, ops: Mapping[str, OpDesc]) -> Iterator[fx.Node]:
    """Views that are operations of their own, though they move nothing: of several in a row the last.

    Those around attention are in its price.
    """
    fixed = set(constants(gm))
    for node in gm.graph.nodes:
        if not _is_view(node) or node in fixed or ops[node.name].kind != "view" or any(map(_is_view, node.users)):
            continue
        source = node.all_input_nodes[0]
        if not _is_attention(_before_views(source)) and not all(map(_is_attention, _after_transposes(node))):
            yield node


def _is_view(node: fx.Node) -> bool:
    """Whether a node gives a value another shape."""
    if packet_of(node) not in _SHAPES:
        return False
    return node.meta["val"].shape != node.all_input_nodes[0].meta["val"].shape


def _before_views(node: fx.Node) -> fx.Node:
    while packet_of(node) in (*_SHAPES, *_TRANSPOSES):
        node = node.all_input_nodes[0]
    return node


def _after_transposes(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if packet_of(user) in _TRANSPOSES:
            yield from _after_transposes(user)
        else:
            yield user


def _is_attention(node: fx.Node) -> bool:
    return packet_of(node) is aten.scaled_dot_product_attention

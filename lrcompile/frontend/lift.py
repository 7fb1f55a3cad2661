"""Turns parametrised ATen operations of an exported graph back into modules at their original paths.

Lifting goes by operator, not by module class: whatever computes `aten.linear` on a parameter becomes an
`nn.Linear`. A weight used twice with the same options becomes one module called twice; a weight tied between
two layers stays one shared Parameter.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lrcompile.graph.graph import attribute, has_attribute, rebuild
from lrcompile.graph.rewrite import set_module
from lrcompile.nn.linear import TransposedLinear

aten = torch.ops.aten
Config = tuple[Any, ...]
Maker = Callable[..., nn.Module]


def lift(gm: fx.GraphModule) -> fx.GraphModule:
    """Lifts every supported operation; returns a plain GraphModule that can be trained, copied and edited."""
    remove_guards(gm)
    lifted: dict[str, Config] = {}
    stored = {node.target: attribute(gm, node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.view.default:
            node.target = aten.reshape.default  # a view forbids other memory layouts of what it reads; values are equal
        found = _describe(gm, node)
        if found is not None:
            _lift_node(gm, node, *found, lifted, stored)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.graph._tracer_cls = None  # export's own, which cannot read a pickled graph
    return rebuild(gm, gm.graph)


def remove_guards(gm: fx.GraphModule) -> None:
    """Erases the input guards and shape assertions that export adds: the compiler checks inputs itself."""
    for node in reversed(list(gm.graph.nodes)):
        is_guard = node.op == "call_module" and node.target == "_guards_fn"
        is_assertion = node.op == "call_function" and node.target in _ASSERTIONS
        if (is_guard or is_assertion) and not node.users:
            gm.graph.erase_node(node)
    if hasattr(gm, "_guards_fn"):
        del gm._guards_fn
    gm.graph.eliminate_dead_code()


_ASSERTIONS = {
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}


def _describe(gm: fx.GraphModule, node: fx.Node) -> tuple[Config, list[Any], dict[str, str | None], Any] | None:
    """(config, data arguments, slot → attribute target, maker) of a node that can be lifted."""
    match node.target:
        case aten.linear.default:
            x, weight, bias = _arguments(node, 3)
            if _rank(weight) != 2 or not _is_bias(bias, _sizes(weight)[0]):
                return None
            return _parametrised(gm, ("linear",), [x], {"weight": weight, "bias": bias}, _make_linear)
        case aten.addmm.default:
            bias, x, weight = _arguments(node, 3)
            scaled = node.kwargs or len(node.args) > 3
            if scaled or _rank(weight) != 2 or bias is None or not _only_multiplied(gm, weight):
                return None
            if not _is_bias(bias, _sizes(weight)[1]):
                return None
            return _parametrised(gm, ("addmm",), [x], {"weight": weight, "bias": bias}, _make_addmm)
        case aten.embedding.default:
            weight, index, padding, scale, sparse = _arguments(node, 5, (-1, False, False))
            if scale or sparse:
                return None
            return _parametrised(gm, ("embedding", padding), [index], {"weight": weight}, _make_embedding)
        case aten.layer_norm.default:
            x, shape, weight, bias, eps, _ = _arguments(node, 6, (None, None, 1e-5, True))
            config = ("layer_norm", tuple(shape), eps)
            return _parametrised(gm, config, [x], {"weight": weight, "bias": bias}, _make_layer_norm)
        case aten.batch_norm.default:
            x, *stored, training, momentum, eps, _ = _arguments(node, 9)
            return None if training else _describe_batch_norm(gm, x, stored, momentum, eps)
        case aten._native_batch_norm_legit_no_training.default:
            x, *stored, momentum, eps = _arguments(node, 7)
            return _describe_batch_norm(gm, x, stored, momentum, eps)
        case aten.dropout.default:
            x, p, train = _arguments(node, 3)
            if train:
                return None
            return ("dropout", p), [x], {}, lambda config: nn.Dropout(config[1])
    return _describe_conv(gm, node)


def _describe_batch_norm(
    gm: fx.GraphModule, x: fx.Node, stored: list[Any], momentum: float, eps: float
) -> tuple[Config, list[Any], dict[str, str | None], Any] | None:
    axes = x.meta["val"].dim() - 2
    if axes not in _BATCH_NORMS:
        return None
    slots = dict(zip(("weight", "bias", "running_mean", "running_var"), stored, strict=True))
    return _parametrised(gm, ("batch_norm", axes, momentum, eps), [x], slots, _make_batch_norm)


def _describe_conv(gm: fx.GraphModule, node: fx.Node) -> tuple[Config, list[Any], dict[str, str | None], Any] | None:
    target = node.target
    if target in _CONVS:
        axes = _CONVS[target]
        x, weight, bias, stride, padding, dilation, groups = _arguments(node, 7, (None, 1, 0, 1, 1))
        if padding != "same" and isinstance(padding, str):
            padding = 0  # "valid"
        config = ("conv", axes, *(_tuple(v, axes) for v in (stride, padding, dilation)), groups)
        return _parametrised(gm, config, [x], {"weight": weight, "bias": bias}, _make_conv)
    if target in _TRANSPOSED_CONVS:
        axes = _TRANSPOSED_CONVS[target]
        x, weight, bias, stride, padding, extra, groups, dilation = _arguments(node, 8, (None, 1, 0, 0, 1, 1))
        config = ("conv_transpose", axes, *(_tuple(v, axes) for v in (stride, padding, dilation, extra)), groups)
        return _parametrised(gm, config, [x], {"weight": weight, "bias": bias}, _make_conv)
    if target == aten.convolution.default:
        x, weight, bias, stride, padding, dilation, transposed, extra, groups = _arguments(node, 9)
        axes = node.args[0].meta["val"].dim() - 2  # type: ignore[union-attr]
        sizes = [_tuple(v, axes) for v in (stride, padding, dilation)]
        config = (
            ("conv_transpose", axes, *sizes, _tuple(extra, axes), groups)
            if transposed
            else ("conv", axes, *sizes, groups)
        )
        return _parametrised(gm, config, [x], {"weight": weight, "bias": bias}, _make_conv)
    return None


_BATCH_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}  # by axes of positions
_CONVS = {
    aten.conv1d.default: 1,
    aten.conv1d.padding: 1,
    aten.conv2d.default: 2,
    aten.conv2d.padding: 2,
    aten.conv3d.default: 3,
    aten.conv3d.padding: 3,
}
_TRANSPOSED_CONVS = {aten.conv_transpose1d.default: 1, aten.conv_transpose2d.input: 2, aten.conv_transpose3d.input: 3}
LAYERS = {
    aten.linear, aten.addmm, aten.embedding, aten.layer_norm, aten.batch_norm,
    aten._native_batch_norm_legit_no_training, aten.convolution,
    *(target.overloadpacket for target in (*_CONVS, *_TRANSPOSED_CONVS)),
}  # fmt: skip
"""What is lifted where its weights are stored tensors."""


def _arguments(node: fx.Node, count: int, defaults: tuple[Any, ...] = ()) -> list[Any]:
    """The node's first `count` arguments in schema order; `defaults` fills the last ones that are not given."""
    filled: list[Any] = [None] * (count - len(defaults)) + list(defaults)
    filled[: len(node.args)] = list(node.args)[:count]
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    for name, value in node.kwargs.items():
        if names.index(name) < count:
            filled[names.index(name)] = value
    return filled


def _rank(value: Any) -> int | None:
    """Number of dimensions of an argument, or None for one that is not given."""
    return value.meta["val"].dim() if isinstance(value, fx.Node) else None


def _sizes(value: Any) -> list[Any]:
    return list(value.meta["val"].shape)


def _is_bias(value: Any, outputs: int) -> bool:
    """Whether an argument is absent or has a number for each output: one for all of them is spread by torch."""
    return value is None or (_rank(value) == 1 and _sizes(value) == [outputs])


def _only_multiplied(gm: fx.GraphModule, weight: fx.Node) -> bool:
    """Whether every use of a stored tensor is as the right factor of `addmm`: only then may it be kept transposed."""
    reads = [node for node in gm.graph.nodes if node.op == "get_attr" and node.target == weight.target]
    return all(
        user.target == aten.addmm.default and user.args[2] is read and user.args.count(read) == 1
        for read in reads
        for user in read.users
    )


def _tuple(value: Any, axes: int) -> Any:
    if isinstance(value, str):
        return value
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * axes if len(values) == 1 else values


def _parametrised(
    gm: fx.GraphModule, config: Config, data: list[Any], slots: dict[str, Any], maker: Maker
) -> tuple[Config, list[Any], dict[str, str | None], Maker] | None:
    """None unless every slot is absent or a stored tensor, and the data arguments are computed values."""
    targets: dict[str, str | None] = {}
    for slot, value in slots.items():
        if value is None:
            targets[slot] = None
        elif isinstance(value, fx.Node) and value.op == "get_attr":
            targets[slot] = value.target  # type: ignore[assignment]
        else:
            return None
    if any(isinstance(value, fx.Node) and value.op == "get_attr" for value in data):
        return None  # a function of constants only
    if any(isinstance(value, fx.Node) for value in pytree.tree_leaves(config)):
        return None  # sizes that are open
    return config, data, targets, maker


def _lift_node(
    gm: fx.GraphModule,
    node: fx.Node,
    config: Config,
    data: list[Any],
    targets: dict[str, str | None],
    maker: Maker,
    lifted: dict[str, Config],
    stored: dict[Any, Any],
) -> None:
    """Puts a module in the place of a node; `stored` has the tensors as they were before any was lifted."""
    tensors = {slot: stored[t] if t is not None else None for slot, t in targets.items()}
    identity = (*config, *(id(t) for t in tensors.values()))
    twins = (path for path, other in lifted.items() if other == identity)
    path = (next(twins, None) if targets else None) or _path(gm, node, config, targets, tensors)
    while lifted[path] != identity if path in lifted else _is_taken(gm, path, tensors):
        path = _next_name(path)
    if path not in lifted:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of layers that hold nothing
            module = maker(config, **tensors)
        module.eval()
        _adopt_counters(gm, path, module)
        set_module(gm, path, module)
        lifted[path] = identity
    with gm.graph.inserting_before(node):
        new = gm.graph.call_module(path, tuple(data))
    new.meta = dict(node.meta)
    if node.target is aten._native_batch_norm_legit_no_training.default:  # returns statistics that inference ignores
        for item in list(node.users):
            new.meta["val"] = item.meta["val"]
            item.replace_all_uses_with(new)
            gm.graph.erase_node(item)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def _path(
    gm: fx.GraphModule,
    node: fx.Node,
    config: Config,
    targets: dict[str, str | None],
    tensors: dict[str, torch.Tensor | None],
) -> str:
    """Where the lifted module goes: the path of the module that called the operation, where that fits."""
    called_from, kind = calling_module(node)
    if called_from and _fits(gm, called_from, tensors):
        return called_from
    target = targets.get("weight") or next((t for t in targets.values() if t is not None), None)
    if target is None:
        if called_from and kind.startswith("torch.nn.modules.") and not has_attribute(gm, called_from):
            return called_from  # a layer without parameters, of which export keeps nothing
        return f"{called_from}.{config[0]}" if called_from else config[0]
    parent, _, leaf = target.rpartition(".")
    if leaf == "weight" and parent and _fits(gm, parent, tensors):
        return parent
    name = config[0] if leaf in ("weight", "bias") else leaf.removesuffix("_weight")
    if name == leaf:
        name = f"{leaf}_{config[0]}"
    return f"{parent}.{name}" if parent else name


def calling_module(node: fx.Node) -> tuple[str, str]:
    """Path and class name of the innermost module that the operation ran in, each empty if unknown.

    An archive can hold any text as a path, which FX prints into source text: one with more than names is unknown.
    """
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "", ""
    path, kind = list(stack.values())[-1]
    path = re.sub(r"@\d+", "", path).removeprefix("L['self'].").removeprefix("L__self__.")
    path = path if re.fullmatch(r"\w+(\.\w+)*", path) else ""
    return path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _fits(gm: fx.GraphModule, path: str, tensors: dict[str, torch.Tensor | None]) -> bool:
    """Whether the container at `path` holds these very tensors under these names, and none that would be misread."""
    try:
        container = gm.get_submodule(path)
    except AttributeError:
        return False
    own = {**container._parameters, **container._buffers}
    if container._modules:
        return False
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if any(getattr(container, name, None) is not tensor for name, tensor in given.items()):
        return False
    return set(own) - {"num_batches_tracked"} <= set(given)


def _is_taken(gm: fx.GraphModule, path: str, tensors: dict[str, torch.Tensor | None]) -> bool:
    return has_attribute(gm, path) and not _fits(gm, path, tensors)


def _adopt_counters(gm: fx.GraphModule, path: str, module: nn.Module) -> None:
    """Carries buffers such as `num_batches_tracked` over, so that no state-dict key is lost."""
    container = gm.get_submodule(path) if has_attribute(gm, path) else nn.Module()
    for name, buffer in container._buffers.items():
        if name in module._buffers and buffer is not None:
            module._buffers[name] = buffer


def _next_name(path: str) -> str:
    match = re.fullmatch(r"(.*)_call(\d+)", path)
    return f"{match[1]}_call{int(match[2]) + 1}" if match else f"{path}_call2"


def _parameter(tensor: torch.Tensor | None) -> nn.Parameter | None:
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=False)


def _assign(module: nn.Module, weight: torch.Tensor | None, bias: torch.Tensor | None) -> nn.Module:
    module.register_parameter("weight", _parameter(weight))
    module.register_parameter("bias", _parameter(bias))
    return module


def _make_linear(config: Config, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    out_features, in_features = weight.shape
    return _assign(nn.Linear(in_features, out_features, bias is not None, device="meta"), weight, bias)


def _make_addmm(config: Config, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    in_features, out_features = weight.shape
    module = TransposedLinear(in_features, out_features, bias is not None, device="meta")
    transposed = nn.Parameter(weight.detach().t(), requires_grad=weight.requires_grad)
    return _assign(module, transposed, bias)


def _make_embedding(config: Config, weight: torch.Tensor) -> nn.Module:
    rows, width = weight.shape
    padding = None if config[1] < 0 else config[1]
    module = nn.Embedding(rows, width, padding_idx=padding, device="meta")
    module.register_parameter("weight", _parameter(weight))
    return module


def _make_layer_norm(config: Config, weight: torch.Tensor | None, bias: torch.Tensor | None) -> nn.Module:
    _, shape, eps = config
    module = nn.LayerNorm(shape, eps=eps, elementwise_affine=weight is not None, bias=bias is not None, device="meta")
    return _assign(module, weight, bias)


def _make_batch_norm(
    config: Config,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
) -> nn.Module:
    _, axes, momentum, eps = config
    module = _BATCH_NORMS[axes](running_mean.shape[0], eps=eps, momentum=momentum, affine=weight is not None)
    _assign(module, weight, bias)
    module.running_mean, module.running_var = running_mean, running_var
    return module


def _make_conv(config: Config, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    kind, axes, stride, padding, dilation, *rest = config
    groups = rest[-1]
    kernel = tuple(weight.shape[2:])
    options: dict[str, Any] = {
        "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
        "bias": bias is not None, "device": "meta",
    }  # fmt: skip
    if kind == "conv":
        classes: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
        channels = (weight.shape[1] * groups, weight.shape[0])
    else:
        classes = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
        channels = (weight.shape[0], weight.shape[1] * groups)
        options["output_padding"] = rest[0]
    return _assign(classes[axes](*channels, kernel, **options), weight, bias)

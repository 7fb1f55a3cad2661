"""Sizes at the edge of what is legal, through the whole compile: handled, or refused with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.export import export as torch_export
from torch.nn import functional

import lrcompile
from lrcompile.emit.folder import load_folder
from lrcompile.errors import BudgetError, InputError
from lrcompile.graph.rewrite import Rewrite
from lrcompile.passes import proposals
from tests.passes import common
from tests.passes.test_pairs import ALL

EXACT, ANY, SMALL = (
    lrcompile.Budget(**b, confidence=0.0) for b in ({"max_error": 0.0}, {"max_error": 10.0}, {"size": 0.5})
)
HEAD = 8


class Use(nn.Module):
    """Layers, and what to do with them."""

    def __init__(self, use: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.use = use
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.use(self, *inputs)


def attention(heads: int, mask: Callable[..., Tensor] | None = None, keys: int | None = None) -> nn.Module:
    """Attention of any number of axes before the sequence; `mask` gets the model's inputs."""

    def use(m: Any, x: Tensor, *more: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, HEAD)).transpose(-2, -3) for layer in (m.q, m.k, m.v))
        allowed = None if mask is None else mask(x, *more)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=keys is not None)
        return m.out(y.transpose(-2, -3).flatten(-2))

    width, narrow = heads * HEAD, (keys or heads) * HEAD
    sizes = {"q": (width, width), "k": (width, narrow), "v": (width, narrow), "out": (width, width)}
    return Use(use, **{name: nn.Linear(*size) for name, size in sizes.items()})


def headless() -> nn.Module:
    return Use(
        lambda m, x: m.out(functional.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x))),
        **{name: nn.Linear(32, 32) for name in ("q", "k", "v", "out")},
    )


def beside(
    layer: nn.Module, first: nn.Module, second: nn.Module, join: Callable[[Tensor, Tensor], Tensor]
) -> nn.Module:
    """Two layers in a row, and one beside them that reads none of the features."""
    return Use(
        lambda m, x: join(m.second(functional.relu(m.first(x))), m.layer(x[:, :0])),
        layer=layer, first=first, second=second,
    )  # fmt: skip


def zeroed(module: nn.Module, groups: int = 1) -> nn.Module:
    """With weights of zero, or one group of them."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter[: len(parameter) // groups] = 0.0
    return module


def then(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(layers[0], nn.ReLU(), *layers[1:])


def sample(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


Case = tuple[Callable[[], nn.Module], tuple[Tensor, ...]]
X2, X3 = sample(2, 16, 8, 8), sample(2, 8, 4, 6, 6)
TOKENS = sample(2, 6, 32)
HANDLED: dict[str, Case] = {
    "a kernel larger than the picture": (
        lambda: then(nn.Conv2d(16, 32, 7, padding=3), nn.Conv2d(32, 32, 3, padding=1)), (sample(2, 16, 4, 4),)),
    "one pixel": (
        lambda: then(nn.Conv2d(16, 32, 7, padding=3), nn.Conv2d(32, 32, 3, padding=1)), (sample(2, 16, 1, 1),)),
    "a stride larger than the picture": (
        lambda: then(nn.Conv2d(16, 32, 3, stride=9, padding=1), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 1)), (X2,)),
    "a dilated kernel larger than the picture": (
        lambda: then(nn.Conv2d(16, 32, 3, padding=9, dilation=9), nn.Conv2d(32, 32, 3, padding=12, dilation=12)),
        (X2,)),
    "circular padding, twice the picture": (
        lambda: then(nn.Conv2d(16, 32, 5, padding=2, padding_mode="circular"), nn.Conv2d(32, 16, 1)),
        (sample(2, 16, 2, 3),)),
    "a kernel longer than the signal": (
        lambda: then(nn.Conv1d(16, 32, 9, padding=4), nn.Conv1d(32, 32, 1)), (sample(2, 16, 3),)),
    "transposed, from one pixel": (
        lambda: then(nn.ConvTranspose2d(16, 32, 5, stride=2), nn.Conv2d(32, 4, 5)), (sample(2, 16, 1, 1),)),
    "a kernel larger than the volume": (
        lambda: then(
            nn.Conv3d(8, 16, (5, 7, 7), padding=(2, 3, 3)), nn.BatchNorm3d(16), nn.Conv3d(16, 16, 3, padding=1)),
        (sample(2, 8, 2, 3, 3),)),
    "one voxel": (
        lambda: then(nn.Conv3d(8, 16, 3, padding=1), nn.Conv3d(16, 16, 3, padding=1), nn.MaxPool3d(1)),
        (sample(2, 8, 1, 1, 1),)),
    "a dilated kernel larger than the volume": (
        lambda: then(
            nn.Conv3d(8, 16, 3, padding=6, dilation=6, stride=(3, 2, 1)), nn.Conv3d(16, 16, 3, padding=2, dilation=2)),
        (X3,)),
    "a kernel of the volume's size": (
        lambda: then(nn.Conv3d(8, 16, (4, 6, 6)), nn.Flatten(), nn.Linear(16, 4)), (X3,)),
    "transposed volumes in groups": (
        lambda: then(
            nn.ConvTranspose3d(8, 16, 5, stride=3, padding=1, output_padding=2, groups=2), nn.Conv3d(16, 4, 1)),
        (sample(2, 8, 1, 1, 2),)),
    "a picture without a batch": (lambda: then(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 1)), (sample(16, 8, 8),)),
    "a volume without a batch": (lambda: then(nn.Conv3d(8, 32, 3), nn.Conv3d(32, 32, 1)), (sample(8, 4, 6, 6),)),
    "channels of prime number": (
        lambda: then(nn.Conv2d(13, 17, 3), nn.Conv2d(17, 19, 1), nn.Conv2d(19, 23, (1, 5))), (sample(2, 13, 9, 9),)),
    "one channel": (
        lambda: then(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 32, 1), nn.Conv2d(32, 1, 5)), (sample(2, 1, 9, 9),)),
    "no features to read": (
        lambda: beside(nn.Linear(0, 3), nn.Linear(32, 32), nn.Linear(32, 3), torch.add), (sample(2, 32),)),
    "no features to make": (
        lambda: beside(nn.Linear(0, 0), nn.Linear(32, 32), nn.Linear(32, 3), lambda y, z: torch.cat((y, z), 1)),
        (sample(2, 32),)),
    "nothing between two layers": (
        lambda: then(nn.Linear(32, 0), nn.Linear(0, 32), nn.Linear(32, 4)), (sample(2, 32),)),
    "weights of zero": (lambda: then(zeroed(nn.Conv2d(16, 32, 3)), nn.Conv2d(32, 32, 3)), (X2,)),
    "all weights of zero": (
        lambda: zeroed(then(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3))), (X2,)),
    "a group of zeros": (
        lambda: then(zeroed(nn.Conv2d(16, 32, 3, groups=2), 2), zeroed(nn.Conv2d(32, 32, 1, groups=4), 4)), (X2,)),
    "a group of zeros in volumes": (
        lambda: then(zeroed(nn.Conv3d(8, 32, 3, groups=2), 2), zeroed(nn.Conv3d(32, 32, 1, groups=4), 4)), (X3,)),
    "a linear layer of zeros": (lambda: then(zeroed(nn.Linear(64, 64)), nn.Linear(64, 64)), (sample(2, 64),)),
    "a table of one row": (
        lambda: nn.Sequential(nn.Embedding(1, 16), nn.Linear(16, 16)), (torch.zeros(2, 3, dtype=torch.int64),)),
    "nothing but padding": (
        lambda: nn.Sequential(nn.Embedding(64, 16, padding_idx=0), nn.Linear(16, 16)),
        (torch.zeros(2, 3, dtype=torch.int64),)),
    "one sample": (lambda: then(nn.Linear(64, 64), nn.Linear(64, 64)), (sample(1, 64),)),
    "values of 1e20": (lambda: nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)), (1e20 * sample(2, 32),)),
    "5 heads": (lambda: attention(5), (sample(2, 6, 5 * HEAD),)),
    "9 heads": (lambda: attention(9), (sample(2, 6, 9 * HEAD),)),
    "one head": (lambda: attention(1), (sample(2, 6, HEAD),)),
    "6 heads that share 3 keys": (lambda: attention(6, keys=3), (sample(2, 6, 6 * HEAD),)),
    "one token": (lambda: attention(4), (sample(2, 1, 32),)),
    "no axis of heads": (headless, (TOKENS,)),
    "tokens without a batch": (lambda: attention(4), (sample(6, 32),)),
    "a mask of rank 2": (lambda: attention(4, lambda x: torch.ones(6, 6).tril().bool()), (TOKENS,)),
    "a mask of rank 3": (lambda: attention(4, lambda x, m: m), (TOKENS, sample(4, 6, 6))),
    "a mask of rank 4, of samples": (
        lambda: attention(4, lambda x, m: m[:, None, None] > 0), (TOKENS, sample(2, 6).abs())),
    "a mask of rank 4, of heads": (lambda: attention(4, lambda x, m: m), (TOKENS, sample(2, 4, 6, 6))),
    "five axes": (lambda: attention(4), (sample(2, 3, 6, 32),)),
    "five axes, heads that share": (lambda: attention(4, keys=2), (sample(2, 3, 6, 32),)),
    "five axes and a mask of samples": (
        lambda: attention(4, lambda x, m: m), (sample(2, 3, 6, 32), sample(2, 1, 1, 1, 6))),
    "five axes and a mask of all": (lambda: attention(4, lambda x, m: m), (sample(2, 3, 6, 32), sample(2, 3, 4, 6, 6))),
    "five axes and one mask": (
        lambda: attention(4, lambda x: torch.ones(1, 1, 1, 6, 6).tril().bool()), (sample(2, 3, 6, 32),)),
    "six axes": (lambda: attention(4), (sample(2, 3, 2, 6, 32),)),
}  # fmt: skip
QUICK = (
    "one pixel", "a dilated kernel larger than the picture", "circular padding, twice the picture",
    "a kernel larger than the volume", "transposed volumes in groups", "a volume without a batch",
    "channels of prime number", "no features to read", "nothing between two layers", "all weights of zero",
    "a group of zeros in volumes", "nothing but padding", "one sample", "values of 1e20", "9 heads",
    "6 heads that share 3 keys", "tokens without a batch", "a mask of rank 3", "five axes and a mask of samples",
    "six axes", "height and width", "volumes", "length after five axes", "number of tokens",
)  # fmt: skip
"""What is compiled by `make test`; the rest is like one of these, and in `make test-all`."""
BEFORE = {name: case for name, case in HANDLED.items() if max(x.dim() for x in case[1]) > 4 or "volume" in name}


def cases(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """A warning on the way is a line that a user would wonder about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        yield


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of layers that hold nothing
        torch.manual_seed(0)
        model = make().eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return model


def far(got: Tensor, expected: Tensor) -> float:
    """The relative difference, absolute where nothing is expected."""
    got = got.detach()
    assert got.shape == expected.shape
    assert bool(got.isfinite().all())
    return float((got - expected).norm() / (expected.norm() or 1.0))


def check(model: nn.Module, args: tuple[Tensor, ...], path: Path, max_rank: int | None) -> None:
    """Nothing changes without a budget; with one, the model changes as much as is said; each rewrite alone runs."""
    prepared = lrcompile.prepare_model(model, args, target="v100", passes=list(ALL.values()), max_rank=max_rank)
    with torch.no_grad():
        expected = model(*args)
    results = []
    for budget in (EXACT, ANY, SMALL):
        try:
            results.append(lrcompile.solve(prepared, budget))
        except BudgetError as error:
            if budget is not SMALL or "cannot be reached" not in str(error):
                raise
            continue
        with torch.no_grad():
            error = far(results[-1].model(*args), expected)
        assert error == pytest.approx(results[-1].report.error["measured"], rel=1e-3, abs=2e-6)
        assert budget is not EXACT or error <= 1e-5
    assert results[-1].save(path / "model.onnx").verification["onnx_vs_torch"] <= 1e-5
    results[-1].save(path / "folder")
    with torch.no_grad():
        assert far(load_folder(path / "folder")(*args), results[-1].model(*args)) <= 1e-5
    for transform in ALL.values():
        found = proposals(prepared.graph, transform, prepared.context)
        rewrites = [proposal for proposal in found if isinstance(proposal, Rewrite)]
        for rewrite in rewrites[:: max(1, len(rewrites) // 3)]:
            after = common.applied(prepared.graph, transform, rewrite, prepared.context)
            (got,) = common.outputs(after, *prepared.traced.flat)
            assert far(got, expected) < 10


@pytest.mark.parametrize("name", cases(HANDLED))
def test_handled(name: str, tmp_path: Path) -> None:
    make, args = HANDLED[name]
    check(seeded(make), args, tmp_path, None)


@pytest.mark.parametrize("name", cases(BEFORE))
def test_handled_at_rank_4(name: str, tmp_path: Path) -> None:
    make, args = HANDLED[name]
    check(seeded(make), args, tmp_path, 4)


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], str]] = {
    "kernel": (lambda: then(nn.Conv2d(16, 32, 9)), (X2,), r"Kernel size can't be greater than actual input size"),
    "mask": (
        lambda: attention(4, lambda x, m: m),
        (TOKENS, sample(3, 6, 6)),
        r"could not trace the model.*torch\.Size\(\[3, 6, 6\]\)",
    ),
    "no channels": (
        lambda: then(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 0, 1)),
        (sample(2, 3, 8, 8),),
        r"weight of size \[0, 16, 1, 1\]",
    ),
    "no outputs": (lambda: then(nn.Linear(32, 0)), (sample(2, 32),), r"the outputs of the model hold nothing"),
    "no samples": (lambda: then(nn.Linear(32, 8)), (sample(0, 32),), r"the example inputs hold no sample"),
    "no volumes": (lambda: then(nn.Conv3d(8, 8, 3)), (sample(0, 8, 4, 6, 6),), r"the example inputs hold no sample"),
    "no tokens": (lambda: attention(4), (sample(2, 0, 32),), r"the outputs of the model hold nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, args, reason = REFUSED[name]
    with pytest.raises(InputError, match=reason):
        lrcompile.compile(seeded(make), args, target="v100", max_rank=4)


# ----------------------------------------------------------------------------------------------------- open sizes

OPEN: dict[str, tuple[Callable[[], nn.Module], Tensor, tuple[int, ...], Tensor]] = {
    "height and width": (
        lambda: then(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, stride=2),
                     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 32)),
        X2, (0, 2, 3), sample(3, 16, 21, 11)),
    "height and width of a fixed batch": (
        lambda: then(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, stride=2)),
        X2, (2, 3), sample(2, 16, 21, 11)),
    "pictures smaller than a kernel": (
        lambda: then(nn.Conv2d(16, 32, 7, padding=3), nn.Conv2d(32, 32, (1, 7), padding=(0, 3)),
                     nn.ConvTranspose2d(32, 16, 2, 2)),
        X2, (0, 2, 3), sample(1, 16, 2, 2)),
    "length of a signal": (
        lambda: then(nn.Conv1d(16, 32, 3, padding=1), nn.BatchNorm1d(32), nn.Conv1d(32, 32, 1)),
        sample(2, 16, 10), (0, 2), sample(3, 16, 21)),
    "volumes": (
        lambda: then(nn.Conv3d(8, 32, 3, padding=1), nn.BatchNorm3d(32), nn.Conv3d(32, 32, 3, padding=1)),
        X3, (0, 2, 3, 4), sample(3, 8, 5, 7, 9)),
    "length": (lambda: attention(4), TOKENS, (0, 1), sample(3, 9, 32)),
    "length after five axes": (lambda: attention(4, keys=2), sample(2, 3, 6, 32), (0, 2), sample(1, 3, 7, 32)),
    "number of tokens": (
        lambda: nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 16)),
        torch.arange(6).reshape(2, 3), (0, 1), torch.arange(36).reshape(4, 9)),
}  # fmt: skip


def program(name: str) -> tuple[nn.Module, torch.export.ExportedProgram]:
    make, x, axes, _ = OPEN[name]
    model = seeded(make)
    shapes: Any = dict.fromkeys(axes, Dim.AUTO)
    return model, torch_export(model, (x,), dynamic_shapes=((shapes,),) if isinstance(model, Use) else (shapes,))


@pytest.mark.parametrize("name", cases(OPEN))
def test_open_sizes_stay_open(name: str, tmp_path: Path) -> None:
    _, x, axes, other = OPEN[name]
    model, exported = program(name)
    with torch.no_grad():
        expected = model(other)
    prepared = lrcompile.prepare_model(exported, (x,), target="v100", passes=list(ALL.values()))
    assert prepared.traced.open_axes == (axes,)
    assert prepared.traced.others[0][0].shape != x.shape
    for budget in (EXACT, lrcompile.Budget(size=0.6, confidence=0.0)):
        result = lrcompile.solve(prepared, budget)
        with torch.no_grad():
            got = result.model(other)
        assert far(got, expected) <= (1e-5 if budget is EXACT else 2.0)
        result.save(tmp_path / "model.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        (given,) = session.get_inputs()
        assert tuple(i for i, size in enumerate(given.shape) if isinstance(size, str)) == axes
        assert far(torch.from_numpy(session.run(None, {given.name: other.numpy()})[0]), got) <= 1e-5
        result.save(tmp_path / "model.pt2")
        assert far(torch.export.load(tmp_path / "model.pt2").module()(other), got) <= 1e-5
        result.save(tmp_path / "folder")
        assert far(load_folder(tmp_path / "folder")(other), got) <= 1e-5


def test_open_sizes_have_names_and_are_written_down(tmp_path: Path) -> None:
    result = lrcompile.compile(program("height and width")[1], (X2,), target="v100")
    result.save(tmp_path / "model.onnx")
    (given,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").get_inputs()
    assert given.shape == ["batch", 16, f"{given.name}_2", f"{given.name}_3"]
    result.save(tmp_path / "folder")
    text = (tmp_path / "folder" / "model.py").read_text()
    assert "the batch size (axis 0), axis 2 of input, axis 3 of input are free." in text


@pytest.mark.parametrize("axes", [(2,), (0, 2, 3, 4)])
def test_open_volumes_have_no_form_of_rank_4(axes: tuple[int, ...]) -> None:
    model = seeded(OPEN["volumes"][0])
    exported = torch_export(model, (X3,), dynamic_shapes=(dict.fromkeys(axes, Dim.AUTO),))
    with pytest.raises(InputError, match=r"input input has open sizes other than the batch, s\d+.*export the model"):
        lrcompile.compile(exported, (X3,), target="v100", max_rank=4)


def test_sizes_that_depend_on_each_other() -> None:
    """The second input is twice as long as the first; a size that the model refuses is not tried."""
    length = Dim("length", min=2, max=5)
    model = Use(lambda m, x, y: m.a(x).repeat(1, 2, 1) * y, a=nn.Linear(8, 8)).eval()
    args = (sample(2, 5, 8), sample(2, 10, 8))
    exported = torch_export(model, args, dynamic_shapes=(({1: length}, {1: 2 * length}),))
    traced = lrcompile.prepare_model(exported, args, target="v100").traced
    assert traced.open_axes == ((1,), (1,))
    assert [tuple(x.shape) for x in traced.others[0]] == [(2, 4, 8), (2, 8, 8)]

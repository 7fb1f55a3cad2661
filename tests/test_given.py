"""Models and data as users have them: types, modes, optional inputs, constants, scripts, samples that do not fit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import Budget, calibration_from
from lrcompile.cli import run
from lrcompile.devices.profile import load_device
from lrcompile.errors import BudgetError, InputError, VerificationError
from lrcompile.frontend.inputs import call_inputs
from lrcompile.frontend.trace import trace
from lrcompile.graph.graph import Graph
from lrcompile.graph.rewrite import Refusal, Rewrite, Rewriter
from lrcompile.graph.verify import rounded_error
from lrcompile.passes import Context, Pass, Stage, proposals
from lrcompile.planning.canonicalize import ROUNDING
from lrcompile.plugins import discover


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu()).mean((2, 3)))


class Cast(nn.Module):
    """Makes its input what its weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(torch.float32) if self.layer.weight.dtype == torch.float32 else x.half())


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor, shift: Tensor | None = None, doubled: bool = False) -> Tensor:
        y = self.layer(x if shift is None else x + shift)
        return 2 * y if doubled else y


class Stateful(Net):
    def get_extra_state(self) -> Any:
        return {"trained": "long"}

    def set_extra_state(self, state: Any) -> None:
        pass


class Ratio(nn.Module):
    """NaN for a sample of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x / x.norm(dim=-1, keepdim=True))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(50, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.table(x))


class Map(Net):
    """The class of each pixel; in the first one two scores are all but equal."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y = self.norm(self.conv(x))
        first = torch.arange(y.shape[-1] * y.shape[-2]).reshape(1, 1, *y.shape[-2:]) == 0
        return torch.cat([y, torch.where(first, y * (1 + 1e-7), y - 1)], 1).argmax(1)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def optional() -> nn.Module:
    return Optional().eval()


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_an_archive_in_another_precision(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    program = torch.export.export(Net().eval(), (images(),))
    torch.export.save(program, "net.pt2")
    assert run(["net.pt2", "--target", "rpi5", "--dtype", dtype, "--out", "out.onnx"]) == 0
    kinds = {t.data_type for t in onnx.load("out.onnx").graph.initializer if len(t.dims) > 1}
    assert kinds == {onnx.TensorProto.FLOAT16 if dtype == "fp16" else onnx.TensorProto.BFLOAT16}
    lrcompile.compile(program, (images(),), target="rpi5", dtype=dtype)
    assert {p.dtype for p in program.state_dict.values() if p.is_floating_point()} == {torch.float32}  # not changed
    torch.export.save(torch.export.export(Cast().eval(), (torch.randn(2, 16),)), "cast.pt2")  # makes all of it float32
    capsys.readouterr()
    assert run(["cast.pt2", "--target", "rpi5", "--dtype", dtype]) == 2
    assert "the model does not run on the given inputs" in " ".join(capsys.readouterr().err.split())


def test_an_archive_keeps_the_types_of_its_inputs() -> None:
    x = torch.randn(2, 16, dtype=torch.float64)
    torch.export.save(torch.export.export(Cast().eval(), (x,)), "net.pt2")
    assert run(["net.pt2", "--target", "rpi5", "--out", "out.onnx"]) == 0
    assert onnx.load("out.onnx").graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.DOUBLE


def test_a_model_stays_in_the_mode_that_it_was_in() -> None:
    model = Net().train()
    model.norm.eval()
    lrcompile.compile(model, (images(),), target="rpi5")
    assert [name for name, module in model.named_modules() if not module.training] == ["norm"]
    with pytest.raises(InputError):
        lrcompile.compile(model, (torch.randn(2, 3),), target="rpi5")
    assert model.drop.training


def test_optional_inputs_may_be_in_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(16, 16)
    np.savez("some.npz", x=x.numpy())
    np.savez("more.npz", x=x.numpy(), shift=x.numpy())
    np.savez("none.npz", shift=x.numpy())
    for name, inputs in (("some", ["x"]), ("more", ["x", "shift"])):
        words = ["test_given_nets:build", "--target", "rpi5", "--calib", f"{name}.npz", "--out", f"{name}.onnx"]
        Path("test_given_nets.py").write_text("from tests.test_given import optional as build\n")
        assert run(words) == 0, capsys.readouterr()
        assert [port.name for port in onnx.load(f"{name}.onnx").graph.input] == inputs
    assert run(["test_given_nets:build", "--target", "rpi5", "--calib", "none.npz"]) == 2
    assert "none.npz lacks the input x" in capsys.readouterr().err
    known = {"input_names": ["x"], "batch": 4, "optional": ["shift", "doubled"]}
    for given, names in (
        ((x, x, x), ["x", "shift", "doubled"]),
        (x, ["x"]),
        ([(x, x)], ["x", "shift"]),
        ({"x": x}, ["x"]),
    ):
        assert list(calibration_from(given, **known).batches[0]) == names  # type: ignore[arg-type]


def test_data_for_an_archive_with_a_constant(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(4, 16)
    torch.export.save(torch.export.export(optional(), (x, None, True)), "net.pt2")
    np.savez("calib.npz", x=torch.randn(16, 16).numpy())
    assert run(["net.pt2", "--target", "rpi5", "--calib", "calib.npz", "--out", "out.onnx"]) == 0, capsys.readouterr()


@pytest.mark.parametrize("scripted", [True, False])
def test_scripts_have_the_names_of_their_parameters(scripted: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval(), torch.randn(4, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script: Any = torch.jit.script(model) if scripted else torch.jit.trace(model, (x,))
    script.save("net.pt")
    (name,) = [argument.name for argument in script.forward.schema.arguments[1:]]
    np.savez("calib.npz", **{name: torch.randn(16, 16).numpy()})
    assert run(["net.pt", "--target", "rpi5", "--calib", "calib.npz", "--out", "out.onnx"]) == 0, capsys.readouterr()
    assert [port.name for port in onnx.load("out.onnx").graph.input] == [name]


def test_a_module_with_more_than_tensors_in_its_state() -> None:
    lrcompile.compile(Stateful().eval(), (images(),), target="rpi5")


def test_samples_that_the_model_was_not_made_for(capsys: pytest.CaptureFixture[str]) -> None:
    ids = torch.randint(50, (16, 6))
    torch.export.save(torch.export.export(Words().eval(), (ids[:4],)), "words.pt2")
    x = torch.randn(16, 16)
    torch.export.save(torch.export.export(Ratio().eval(), (x[:4],)), "ratio.pt2")
    for place in (0, 15):  # in what is fitted to, and in what judges
        beyond, zeros = ids.clone(), x.clone()
        beyond[place, 2], zeros[place] = 50, 0.0
        for name, value, says in (
            ("words", beyond, "the model does not run on the data given with --calib"),
            ("ratio", zeros, "NaN"),
        ):
            np.savez("calib.npz", x=value.numpy())
            assert run([f"{name}.pt2", "--target", "rpi5", "--calib", "calib.npz", "--out", "out.onnx"]) == 2
            assert says in " ".join(capsys.readouterr().err.split())
    assert not Path("out.onnx").exists()


@pytest.mark.parametrize(
    "words", ["--max-error 0.01", "--size 50%", "--speedup 2", "--max-latency 1ms", "--skip conv", "--strategy beam"]
)
def test_a_replay_takes_no_limits(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.export.save(torch.export.export(Net().eval(), (images(),)), "net.pt2")
    assert run(["net.pt2", "--target", "rpi5", "--plan-out", "plan.json"]) == 0
    capsys.readouterr()
    assert run(["net.pt2", "--plan", "plan.json", *words.split(), "--out", "out.onnx"]) == 2
    assert f"{words.split()[0]} has no meaning with --plan" in " ".join(capsys.readouterr().err.split())
    assert not Path("out.onnx").exists()


def test_what_rounding_alone_costs_is_within_the_error_too() -> None:
    """Folding a batch norm rounds weights anew, in bf16 by far more than this."""
    model, x = Net().eval(), (images(),)
    with torch.no_grad():
        model.norm.running_var.uniform_(0.5, 2.0)
        model.norm.weight.uniform_(0.5, 2.0)
    result = lrcompile.compile(model, x, target="rpi5", dtype="bf16", budget=Budget(max_error=1e-4))
    assert not result.plan.rewrites
    assert result.report.error["measured"] == 0.0
    assert any("round to an error above what is allowed" in note for note in result.report.notes)
    assert lrcompile.compile(model, x, target="rpi5", dtype="bf16", budget=Budget(max_error=0.05)).plan.rewrites
    with pytest.raises(BudgetError, match="round to an error of"):
        lrcompile.compile(model, x, target="rpi5", dtype="bf16", budget=Budget(max_error=1e-4, speedup=1.0))


class Scaling(Pass):
    """Says that it is exact, and is not."""

    name = "scaling"
    stage = Stage.CANONICALIZE

    def propose(self, graph: Graph, context: Context) -> Iterator[Rewrite]:
        for site in graph.modules_of(nn.Linear):
            if not hasattr(site.module, "scaled"):
                yield site.rewrite(exact=True)

    def apply(self, rewriter: Rewriter, rewrite: Rewrite) -> None:
        site = rewriter.site()
        layer: Any = copy.deepcopy(site.module)
        layer.weight.data *= 1.5
        layer.scaled = True
        rewriter.set_module(site.path, layer)


def test_a_model_that_makes_much_of_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision rounding weights anew may cost more than is usual; what is no rounding is still found."""
    model, x = Net().eval(), (images(),)
    with torch.no_grad():
        model.norm.running_var.uniform_(0.5, 2.0)
        model.norm.weight.uniform_(0.5, 2.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setitem(ROUNDING, "bf16", 1e-5)
    result = lrcompile.compile(model, x, target="rpi5", dtype="bf16", budget=Budget(max_error=0.05))
    assert any(rewrite.pass_name == "fold-batch-norm" for rewrite in result.plan.rewrites)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    passes = [*discover().passes, Scaling()]
    with pytest.raises(VerificationError, match="pass scaling at head promised an exact rewrite"):
        lrcompile.compile(model, x, target="rpi5", dtype="bf16", budget=Budget(max_error=0.05), passes=passes)


class Stem(nn.Module):
    """A block in half precision, a batch norm or two layers, before more in single precision."""

    def __init__(self, block: nn.Module, width: int) -> None:
        super().__init__()
        self.block, self.head = block.half(), nn.Linear(width, 512)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).float().flatten(1))


@pytest.mark.parametrize("kind", ["fold-batch-norm", "compose-linear"])
def test_exact_rewrites_of_a_block_in_half_precision(kind: str) -> None:
    norm = nn.BatchNorm2d(8)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    pair = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 16))
    folds = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
    block, x = (folds, images()) if kind == "fold-batch-norm" else (pair, torch.randn(64, 256))
    model = Stem(block, block(x).flatten(1).shape[1]).eval()
    result = lrcompile.compile(model, (x.half(),), target="rpi5", budget=Budget(max_error=0.05))
    assert result.plan.rewrites[-1].pass_name == kind
    assert 1e-5 < result.report.error["measured"] < 2e-3


class Twins(Map):
    """Classes of two layers that can be merged, which rounds anew."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64)
        self.one, self.other = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).movedim(1, -1)
        one, other = self.one(y), self.other(y)
        return torch.cat([one - other, (one - other) * (1 + 1e-7)], -1).argmax(-1)


@pytest.mark.parametrize("budget", [Budget(), Budget(max_error=0.0), Budget(max_error=0.3, strategy="energy")])
@pytest.mark.parametrize("kind", [Map, Twins])
def test_whole_numbers_stay_as_they_are_within_a_limit(kind: type[nn.Module], budget: Budget) -> None:
    """An exact rewrite that turns one of them is not made, and is called no fault of a pass."""
    model = kind().eval()
    with torch.no_grad():
        model.norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr,operator]
    x = torch.randn(2, 3, 66, 66)
    result = lrcompile.compile(model, (x,), target="rpi5", budget=budget)
    assert torch.equal(result.model(x), model(x))
    assert result.report.error["measured"] == 0.0


def test_a_front_of_whole_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    model = Map().eval()
    with torch.no_grad():
        model.norm.running_var.uniform_(0.5, 2.0)
    torch.export.save(torch.export.export(model, (torch.randn(2, 3, 66, 66),)), "map.pt2")
    assert run(["tradeoff", "map.pt2", "--target", "rpi5", "--points", "3", "--json"]) == 0
    assert '"points"' in capsys.readouterr().out


def test_classes_next_to_equal_do_not_make_a_pass_a_liar() -> None:
    model = Map().eval()
    with torch.no_grad():
        model.norm.running_var.uniform_(0.5, 2.0)
    large = (torch.randn(2, 3, 66, 66),)
    result = lrcompile.compile(model, large, target="rpi5", budget=Budget(size=1.0))
    assert any(rewrite.pass_name == "fold-batch-norm" for rewrite in result.plan.rewrites)
    report = result.save("map.onnx")
    assert report.verification["onnx_vs_torch"] < 1e-3  # the share of other classes
    assert (
        rounded_error([torch.tensor([1, 2, 3, 4]), torch.ones(2)], [torch.tensor([1, 2, 3, 5]), torch.ones(2)]) == 0.25
    )
    assert rounded_error([torch.tensor([1, 2])], [torch.tensor([1])]) == float("inf")


def test_two_tables_looked_up_with_the_same_numbers() -> None:
    """The counts of one are as long as the other table."""

    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Embedding(500, 32), nn.Embedding(60, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(x) + self.b(x)) + self.head(self.b(x))

    ids = torch.randint(60, (32, 6))
    data = calibration_from({"x": ids}, ["x"], 4)
    result = lrcompile.compile(
        Tables().eval(), (ids[:4],), target="rpi5", budget=Budget(size=0.5), calibration=data
    )  # fmt: skip
    assert any(rewrite.pass_name == "low-rank-embedding" for rewrite in result.plan.rewrites)


def test_a_batch_norm_can_be_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    for skip, folded in (((), True), (("1",), False), (("0",), False)):
        result = lrcompile.compile(model, (images(),), target="rpi5", skip=skip)
        assert any(rewrite.pass_name == "fold-batch-norm" for rewrite in result.plan.rewrites) == folded
        again = lrcompile.compile(model, (images(),), plan=result.plan)
        assert again.plan.dumps() == result.plan.dumps()


def test_heads_of_some_positions_alone_are_refused() -> None:
    class First(nn.Module):
        """Attention of the first position to all, of one sample."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))

        def forward(self, x: Tensor, pos: Tensor) -> Tensor:
            x = x + pos
            q, k, v = (f(x).view(1, 16, 4, 16).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = nn.functional.scaled_dot_product_attention(q[:, :, :1], k, v)
            return self.o(y.transpose(1, 2).reshape(1, 1, 64))

    x = (torch.randn(1, 16, 64), torch.randn(16, 64))
    result = lrcompile.compile(First().eval(), x, target="rpi5", budget=Budget(max_error=2.0))
    assert not any(rewrite.pass_name == "group-heads" for rewrite in result.plan.rewrites)
    graph, heads = trace(First().eval(), x).graph, next(t for t in discover().passes if t.name == "group-heads")
    found = list(proposals(graph, heads, Context(load_device("rpi5"), "fp32")))
    assert [proposal.reason for proposal in found if isinstance(proposal, Refusal)] == ["only some positions are read"]
    assert all(isinstance(proposal, Refusal) for proposal in found)


class ByPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor, /, mask: Tensor) -> Tensor:
        return self.layer(x) * mask


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((torch.ones(2, 16),), {}), ((torch.ones(2, 16),) * 3, {}), ((torch.ones(2, 16),), {"msk": torch.ones(2, 16)})],
)
def test_inputs_that_forward_does_not_take(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match=r"does not take these inputs.*forward takes \(x"):
        trace(ByPlace(), args, kwargs)


def test_inputs_by_position_alone_can_be_named() -> None:
    x, mask = torch.randn(2, 16), torch.rand(2, 16)
    args, kwargs = call_inputs(ByPlace(), {"mask": mask, "x": x})
    assert (args, kwargs) == ((x,), {"mask": mask})
    assert trace(ByPlace(), args, kwargs).input_names == ("x", "mask")


def test_a_tensor_in_place_of_a_tuple_is_one_input() -> None:
    x = torch.randn(5, 16)
    result = lrcompile.compile(nn.Linear(16, 16), x, target="rpi5")  # type: ignore[arg-type]
    assert torch.equal(result.traced.flat[0], x)


def test_weights_of_hooks_in_another_precision() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.utils.weight_norm(nn.Linear(16, 16)).eval()
    x = torch.randn(4, 16)
    model(x)  # the hook leaves a weight that is no leaf
    result = lrcompile.compile(model, (x,), target="rpi5", dtype="fp16")
    with torch.no_grad():
        assert torch.allclose(result.model(x.half()).float(), model(x), atol=2e-2)


def test_a_precision_that_nothing_computes_with() -> None:
    model = nn.Linear(16, 16).to(torch.float8_e4m3fn)
    with pytest.raises(InputError, match="float8_e4m3fn, which nothing here computes with"):
        lrcompile.compile(model, (torch.randn(4, 16),))

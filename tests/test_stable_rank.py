"""The stable-rank penalty: its value, what it does to spectra in training, and which layers of a plan it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import Budget, Rewrite, StableRank, calibration_from
from lrcompile.errors import InputError

WIDTH = 48
RANK = 8


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(16, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(WIDTH, 4))


def share_of_tail(matrix: Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(matrix.double()).square()
    return float(values[rank:].sum() / values.sum())


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_it_is_the_ratio_of_the_spectrum(shape: tuple[int, int]) -> None:
    layer = nn.Linear(*shape)
    values = torch.linalg.svdvals(layer.weight.detach()).square()
    penalty = StableRank(nn.Sequential(layer), {"0": 5}, strength=1.0)
    assert penalty().item() == pytest.approx(float(values[5:].sum() / values[:5].sum()), rel=1e-4)


def test_its_gradient_is_that_of_the_spectrum() -> None:
    """At the point where directions are found, holding them changes nothing: singular vectors move singular values by
    the second order only."""
    layer = nn.Linear(10, 7, dtype=torch.float32)
    StableRank(nn.Sequential(layer), {"0": 3}, strength=1.0)().backward()  # type: ignore[no-untyped-call]
    got = layer.weight.grad
    assert got is not None
    weight = layer.weight.detach().double().requires_grad_()
    values = torch.linalg.svdvals(weight).square()
    (values[3:].sum() / values[:3].sum()).backward()
    assert weight.grad is not None
    torch.testing.assert_close(got.double(), weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("params", "weight", "expected"),
    [
        ({"form": "pointwise", "rank": 3}, (6, 5, 1, 1), [lambda w: w.flatten(1)]),
        ({"form": "spatial", "rank": 3}, (6, 5, 3, 2), [lambda w: w.permute(0, 3, 1, 2).reshape(12, 15)]),
        (
            {"form": "tucker", "rank_out": 3, "rank_in": 2},
            (6, 5, 3, 3),
            [lambda w: w.flatten(1), lambda w: w.transpose(0, 1).flatten(1)],
        ),
        ({"form": "tucker", "rank_out": 3, "rank_in": 2}, (6, 5, 3), [lambda w: w.flatten(1), None]),
        ({"form": "2plus1", "rank": 8}, (6, 5, 3, 2, 2), [lambda w: w.permute(0, 2, 1, 3, 4).reshape(18, 20)]),
        ({"form": "1plus2", "rank": 7}, (6, 5, 3, 2, 2), [lambda w: w.permute(0, 3, 4, 1, 2).reshape(24, 15)]),
    ],
)
def test_kernels_are_seen_as_they_are_split(params: dict[str, object], weight: tuple[int, ...], expected: list) -> None:  # type: ignore[type-arg]
    kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(weight)]
    layer = kind(weight[1], weight[0], weight[2:])  # type: ignore[arg-type]
    rewrite = Rewrite("low-rank-conv", ("0",), params, error=0.1)  # type: ignore[arg-type]
    penalty = StableRank.of(nn.Sequential(layer), [rewrite], strength=1.0)
    unfold = [view or (lambda w: w.transpose(0, 1).flatten(1)) for view in expected]
    ranks = [value for value in params.values() if isinstance(value, int)]
    shares = [share_of_tail(view(layer.weight.detach()), rank) for view, rank in zip(unfold, ranks, strict=True)]
    assert penalty().item() == pytest.approx(sum(share / (1 - share) for share in shares), rel=1e-4)


def test_transposed_kernels_have_their_inputs_first() -> None:
    layer = nn.ConvTranspose2d(5, 12, 3)
    rewrite = Rewrite("low-rank-conv", ("0",), {"form": "tucker", "rank_out": 9, "rank_in": 2}, error=0.1)
    penalty = StableRank.of(nn.Sequential(layer), [rewrite], strength=1.0)
    kernel = layer.weight.detach().transpose(0, 1)
    views = ((kernel.flatten(1), 9), (kernel.transpose(0, 1).flatten(1), 2))
    shares = [share_of_tail(view, rank) for view, rank in views]
    assert penalty().item() == pytest.approx(sum(share / (1 - share) for share in shares), rel=1e-4)


def trained(strength: float, seed: int = 0) -> tuple[nn.Module, float]:
    """(a net that learned which of four sums is the largest, its accuracy)."""
    model = net(seed)
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 16, generator=chance)
    y = x.unflatten(1, (4, 4)).sum(-1).argmax(-1)
    penalty = StableRank(model, {"2": RANK, "4": RANK}, strength=strength)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    steps = 150
    for step in range(steps):
        loss = nn.functional.cross_entropy(model(x), y) + (penalty(step / steps) if strength else 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model, float((model(x).argmax(-1) == y).float().mean())


def test_trained_with_it_the_tail_is_smaller_and_a_split_loses_less() -> None:
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(9))
    lost, tails = [], []
    for strength in (0.0, 0.1):
        model, accuracy = trained(strength)
        assert accuracy > 0.9
        tails.append([share_of_tail(model.get_submodule(path).weight.detach(), RANK) for path in ("2", "4")])  # type: ignore[operator]
        with torch.no_grad():
            expected = model(x)
            for path in ("2", "4"):
                layer = model.get_submodule(path)
                u, s, v = torch.linalg.svd(layer.weight)  # type: ignore[arg-type]
                layer.weight.copy_(u[:, :RANK] * s[:RANK] @ v[:RANK])  # type: ignore[operator]
            lost.append(float((model(x) - expected).norm() / expected.norm()))
    assert all(with_it <= 0.6 * without for without, with_it in zip(*tails, strict=True))
    assert lost[1] < 0.6 * lost[0]


def test_it_rises_over_the_ramp_and_its_directions_are_renewed() -> None:
    model = net()
    penalty = StableRank(model, {"2": RANK}, strength=1.0, ramp=0.5, refresh=2)
    whole = penalty(1.0).item()
    assert penalty(0.25).item() == pytest.approx(whole / 2)
    with torch.no_grad():
        model[2].weight.copy_(torch.randn(WIDTH, WIDTH))
    renewed = penalty(1.0).item()
    assert renewed == pytest.approx(StableRank(model, {"2": RANK}, strength=1.0)().item())
    with torch.no_grad():
        model[2].weight.copy_(torch.randn(WIDTH, WIDTH))
    assert penalty(1.0).item() > 1.5 * StableRank(model, {"2": RANK}, strength=1.0)().item()  # directions of before


def test_the_splits_of_a_plan() -> None:
    model = net().eval()
    data = calibration_from({"input": torch.randn(64, 16)}, ["input"], 8)
    result = lrcompile.compile(model, (torch.randn(8, 16),), target="rpi5", budget=Budget(size=0.7), calibration=data)
    split = {rewrite.site[0] for rewrite in result.plan.rewrites if rewrite.pass_name == "low-rank-linear"}
    assert split
    assert set(StableRank.of(model, result.plan.rewrites).layers) == split


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        ({"nothing": 3}, "'nothing' is no layer with a matrix or kernel"),
        ({"1": 3}, "'1' is no layer with a matrix or kernel"),
        ({"2": 0}, "2 has ranks 1 to 48, got 0"),
        ({"0": 17}, "0 has ranks 1 to 16, got 17"),
    ],
)
def test_bad_ranks(ranks: dict[str, int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        StableRank(net(), ranks)


def test_a_plan_without_splits() -> None:
    with pytest.raises(InputError, match="no rewrite splits a layer of this model"):
        StableRank.of(net(), [Rewrite("fold-batch-norm", ("2",), exact=True)])

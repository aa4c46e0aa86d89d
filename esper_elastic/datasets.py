"""Real images for the main job: Fashion-MNIST, from wherever this machine can get it.

Owns finding, verifying and caching the four files; refuses to train on anything whose content is not exactly the published one. Sources
are tried in this order: the cache, an installed ``dataset-fashion-mnist`` package, that package fetched and unpacked without root, the data
set's own address, and last scikit-learn's digits, a much smaller task that says so wherever it is shown.

The cache is ``$ESPER_ELASTIC_DATA``, else ``./data`` where that folder exists, else the user's cache directory.

Shape legend: N images, C channels (1), H and W pixels (28).
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import ElasticError

INSTALLED_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"
HOME_ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
IMAGE_SIZE = 28
NETWORK_TIMEOUT_S = 10
PACKAGE_TIMEOUT_S = 90

# Checksums of the uncompressed content: distributors compress it anew.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_COMMAND_FAILURES = (OSError, subprocess.SubprocessError)


@dataclass(frozen=True)
class ImageData:
    """A labelled set of grey images, split in two.

    Shape: ``train_images`` and ``test_images`` are uint8 ``(N, 1, 28, 28)``; ``train_labels`` and ``test_labels`` int64 ``(N,)``.
    """

    name: str
    source: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int = 10
    caveat: str = ""


def load(cache: Path | None = None) -> ImageData:
    """Return Fashion-MNIST, or scikit-learn's digits where it cannot be had.

    Args:
        cache: where the files are kept; ``cache_folder()`` by default.

    Effects: on the first call fetches 31 MB and writes them to the cache, each file whole or not at all.

    Raises:
        ElasticError: no source works, with what each one said.
    """
    refusals: list[str] = []
    data = _load_fashion_mnist(cache or cache_folder(), refusals)
    return data if data is not None else _load_digits(refusals)


def cache_folder() -> Path:
    """Return the folder that downloaded files are kept in; nothing is created."""
    if chosen := os.environ.get("ESPER_ELASTIC_DATA"):
        return Path(chosen).expanduser()
    if Path("data").is_dir():
        return Path("data").resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "esper_elastic"


def read_idx(content: bytes, *, where: str = "idx") -> Tensor:
    """Decode the IDX format: two zero bytes, a type, the number of axes, their sizes in big-endian order, then the values.

    Shape: whatever the header says, uint8.

    Raises:
        ElasticError: another type than unsigned bytes, or a length that the header does not announce.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ElasticError(f"{where}: expected an IDX file of unsigned bytes (00 00 08 ..), got {content[:3].hex(' ')!r}. Fetch it again.")
    num_axes = content[3]
    sizes = [int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(num_axes)]
    start = 4 + 4 * num_axes
    expected = start + torch.Size(sizes).numel()
    if len(content) != expected:
        raise ElasticError(f"{where}: expected {expected} bytes for shape {tuple(sizes)}, got {len(content)}. Fetch it again.")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].reshape(sizes)


def _load_fashion_mnist(cache: Path, refusals: list[str]) -> ImageData | None:
    folder = cache / "fashion-mnist"
    sources: list[tuple[str, Callable[[Path], None] | None, Path]] = [
        ("cache", None, folder),
        ("installed package", None, INSTALLED_FOLDER),
        ("Debian package", _fetch_debian_package, folder),
        ("its own address", _fetch_from_home, folder),
    ]
    for source, fetch, where in sources:
        try:
            if fetch is not None:
                with _staging(folder) as staged:
                    fetch(staged)
                    content = _read_verified(staged)
                    _publish(staged, folder)
            else:
                content = _read_verified(where)
        except (ElasticError, zlib.error, EOFError, *_COMMAND_FAILURES) as refusal:
            refusals.append(f"{source}: {refusal}")
        else:
            return ImageData("Fashion-MNIST", source, *content)
    return None


def _read_verified(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = {}
    for name, sha256 in SHA256.items():
        path = folder / f"{name}.gz"
        content = gzip.decompress(path.read_bytes())
        if (found := hashlib.sha256(content).hexdigest()) != sha256:
            raise ElasticError(f"{path}: expected content with sha256 {sha256[:12]}.., got {found[:12]}... Delete it and run again.")
        tensors[name] = read_idx(content, where=str(path))
    return (
        tensors["train-images-idx3-ubyte"].unsqueeze(1),
        tensors["train-labels-idx1-ubyte"].long(),
        tensors["t10k-images-idx3-ubyte"].unsqueeze(1),
        tensors["t10k-labels-idx1-ubyte"].long(),
    )


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A scratch folder on the cache's own file system, so that publishing is a rename."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as scratch:
        yield Path(scratch)


def _publish(staged: Path, folder: Path) -> None:
    for name in SHA256:
        os.replace(staged / f"{name}.gz", folder / f"{name}.gz")


def _fetch_debian_package(staged: Path) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise ElasticError("apt-get and dpkg: expected both, got a machine without them")
    try:
        _run(_apt("download", DEBIAN_PACKAGE), staged)
    except _COMMAND_FAILURES:  # most often there are no package lists yet; private ones need no root
        private = [f"Dir::State={staged}/state", "Dir::State::status=/var/lib/dpkg/status", f"Dir::Cache={staged}/cache"]
        for part in ("state/lists/partial", "cache/archives/partial"):
            (staged / part).mkdir(parents=True)
        _run(_apt("update", options=private), staged)
        _run(_apt("download", DEBIAN_PACKAGE, options=private), staged)
    package = next(staged.glob("*.deb"))
    _run(["dpkg", "-x", package.name, "unpacked"], staged)
    for name in SHA256:
        os.replace(staged / "unpacked" / INSTALLED_FOLDER.relative_to("/") / f"{name}.gz", staged / f"{name}.gz")


def _apt(*arguments: str, options: list[str] | None = None) -> list[str]:
    given = [f"Acquire::http::Timeout={NETWORK_TIMEOUT_S}", "Acquire::Retries=0", *(options or [])]
    return ["apt-get", "-q", *(f"-o{option}" for option in given), *arguments]


def _run(command: list[str], folder: Path) -> None:
    finished = subprocess.run(command, cwd=folder, timeout=PACKAGE_TIMEOUT_S, capture_output=True, text=True)
    if finished.returncode:
        said = (finished.stderr.strip() or finished.stdout.strip()).splitlines()
        raise subprocess.SubprocessError(f"{command[0]} exited with {finished.returncode}: {said[-1] if said else 'no message'}")


def _fetch_from_home(staged: Path) -> None:
    for name in SHA256:
        with urllib.request.urlopen(f"{HOME_ADDRESS}/{name}.gz", timeout=NETWORK_TIMEOUT_S) as answer:
            (staged / f"{name}.gz").write_bytes(answer.read())


def _load_digits(refusals: list[str]) -> ImageData:
    """Scikit-learn's 1,797 digits of 8 x 8 pixels, enlarged to 28 x 28; the last 360 are the test set."""
    tried = "; ".join(refusals)
    try:
        from sklearn.datasets import load_digits
    except ImportError as missing:
        raise ElasticError(
            f"datasets.load: expected Fashion-MNIST or scikit-learn's digits, got neither ({tried}). "
            f"Install the Debian package {DEBIAN_PACKAGE}, put its four .gz files into {cache_folder() / 'fashion-mnist'}, "
            "or pip install scikit-learn."
        ) from missing
    digits = load_digits()
    small = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    images = torch.nn.functional.interpolate(small, size, mode="bilinear", align_corners=False).round().clamp(0, 255).byte()
    labels = torch.from_numpy(digits.target).long()
    split = len(images) - 360
    return ImageData(
        "scikit-learn digits",
        "scikit-learn",
        images[:split],
        labels[:split],
        images[split:],
        labels[split:],
        caveat=f"Fashion-MNIST could not be had ({tried}): this is scikit-learn's digits, 1,797 small images, a much easier task.",
    )

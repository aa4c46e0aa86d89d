"""Fashion-MNIST comes whole or not at all, from whichever source answers; no test here needs a network."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from esper_elastic import datasets
from esper_elastic.errors import ElasticError

SHAPES = {
    "train-images-idx3-ubyte": (6, 28, 28),
    "train-labels-idx1-ubyte": (6,),
    "t10k-images-idx3-ubyte": (3, 28, 28),
    "t10k-labels-idx1-ubyte": (3,),
}
NOBODY = "http://127.0.0.1:9"


def idx(values: torch.Tensor) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return b"\x00\x00\x08" + bytes([values.ndim]) + sizes + bytes(values.flatten().tolist())


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny data set that passes for the published one, on a machine where no source answers."""
    folder = tmp_path / "published"
    folder.mkdir()
    checksums = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        content = idx(torch.randint(0, 256 if len(shape) == 3 else 10, shape, generator=torch.Generator().manual_seed(seed)))
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        checksums[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(datasets, "SHA256", checksums)
    monkeypatch.setattr(datasets, "INSTALLED_FOLDER", tmp_path / "nothing-installed")
    monkeypatch.setattr(datasets, "HOME_ADDRESS", NOBODY)
    monkeypatch.setattr(datasets.shutil, "which", lambda name: None)
    return folder


@pytest.fixture
def served(published: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The published folder on a server of this machine, in the place of the data set's address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(published))
    handler.log_message = lambda *args: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(datasets, "HOME_ADDRESS", f"http://127.0.0.1:{server.server_address[1]}")
        yield published
        server.shutdown()


@pytest.mark.parametrize("shape", [(4,), (3, 28, 28), (0,), (2, 1)], ids=str)
def test_idx_is_read_as_it_was_written(shape: tuple[int, ...]) -> None:
    values = torch.randint(0, 256, shape, dtype=torch.uint8)
    assert torch.equal(datasets.read_idx(idx(values)), values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00", "f.gz: expected an IDX file of unsigned bytes"),
        (b"", "expected an IDX file of unsigned bytes"),
        (idx(torch.arange(5))[:-1], r"expected 13 bytes for shape \(5,\), got 12"),
        (idx(torch.arange(5)) + b"x", r"expected 13 bytes for shape \(5,\), got 14"),
    ],
    ids=["floats", "empty", "cut", "too-long"],
)
def test_a_broken_idx_file_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ElasticError, match=message):
        datasets.read_idx(content, where="f.gz")


def test_an_installed_package_is_read_in_place(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "INSTALLED_FOLDER", published)
    data = datasets.load(tmp_path / "cache")
    assert (data.name, data.source) == ("Fashion-MNIST", "installed package")
    assert data.train_images.shape == (6, 1, 28, 28)
    assert data.test_labels.dtype == torch.int64
    assert not (tmp_path / "cache").exists()


def test_the_home_address_fills_the_cache_once(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = datasets.load(tmp_path)
    monkeypatch.setattr(datasets, "HOME_ADDRESS", NOBODY)
    second = datasets.load(tmp_path)
    assert (first.source, second.source) == ("its own address", "cache")
    assert torch.equal(first.train_images, second.train_images)
    assert sorted(path.name for path in (tmp_path / "fashion-mnist").iterdir()) == sorted(f"{name}.gz" for name in SHAPES)


def test_a_damaged_cache_is_fetched_again(served: Path, tmp_path: Path) -> None:
    datasets.load(tmp_path)
    (tmp_path / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"not even gzip")
    assert datasets.load(tmp_path).source == "its own address"
    assert datasets.load(tmp_path).source == "cache"


def test_wrong_content_never_reaches_the_cache(served: Path, tmp_path: Path) -> None:
    (served / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(torch.full((3,), 7))))
    assert datasets.load(tmp_path).name == "scikit-learn digits"
    assert list((tmp_path / "fashion-mnist").iterdir()) == []


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="builds a Debian package")
def test_a_debian_package_is_unpacked_without_installing_it(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "package"
    shutil.copytree(published, root / "usr/share/datasets/fashion-mnist")
    (root / "DEBIAN").mkdir()
    fields = {"Package": datasets.DEBIAN_PACKAGE, "Version": "1", "Architecture": "all", "Maintainer": "x <x@x.x>", "Description": "x"}
    (root / "DEBIAN/control").write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
    package = tmp_path / "dataset-fashion-mnist_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(root), str(package)], check=True, capture_output=True)
    monkeypatch.setattr(datasets, "INSTALLED_FOLDER", Path("/usr/share/datasets/fashion-mnist"))
    monkeypatch.setattr(datasets.shutil, "which", lambda name: f"/usr/bin/{name}")
    asked = []

    def copy_instead_of_download(*arguments: str, options: list[str] | None = None) -> list[str]:
        asked.append((arguments, options is not None))
        if options is None:  # as where there are no package lists yet
            return ["false"]
        return ["true"] if arguments == ("update",) else ["cp", str(package), "."]

    monkeypatch.setattr(datasets, "_apt", copy_instead_of_download)
    if datasets.INSTALLED_FOLDER.exists():
        pytest.skip("the real package is installed here")
    assert datasets.load(tmp_path / "cache").source == "Debian package"
    download = ("download", "dataset-fashion-mnist")
    assert asked == [(download, False), (("update",), True), (download, True)]
    assert datasets.load(tmp_path / "cache").source == "cache"


def test_digits_are_the_last_resort_and_say_so(published: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    data = datasets.load(tmp_path)
    assert data.name == "scikit-learn digits"
    assert "Fashion-MNIST could not be had" in data.caveat
    assert "its own address" in data.caveat
    assert data.train_images.shape[1:] == (1, 28, 28)
    assert data.train_images.dtype == torch.uint8
    assert data.train_images.max() == 255
    assert (len(data.train_labels), len(data.test_labels)) == (1437, 360)


def test_without_any_source_the_error_names_the_remedies(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ElasticError, match=r"datasets.load: expected .* got neither .*Install the Debian package dataset-fashion-mnist"):
        datasets.load(tmp_path)


@pytest.mark.parametrize(
    ("environment", "has_data_folder", "expected"),
    [
        ({"ESPER_ELASTIC_DATA": "chosen"}, True, "chosen"),
        ({}, True, "data"),
        ({"XDG_CACHE_HOME": "cache"}, False, "cache/esper_elastic"),
    ],
    ids=["chosen", "working-folder", "user-cache"],
)
def test_the_cache_is_where_it_was_asked_for(
    environment: dict[str, str], has_data_folder: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ESPER_ELASTIC_DATA", raising=False)
    for name, folder in environment.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    if has_data_folder:
        (tmp_path / "data").mkdir()
    assert datasets.cache_folder() == tmp_path / expected
    assert not (tmp_path / "chosen").exists()

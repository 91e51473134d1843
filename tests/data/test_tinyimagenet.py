import hashlib
import os
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from certtrain.data import load_dataset, tinyimagenet
from certtrain.errors import DataError

SHARED = Path(os.environ.get("CERTTRAIN_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
SAMPLE = SHARED / "tiny-imagenet-sample" / "tiny-imagenet-200"
WNIDS = ("n30", "n10", "n20")  # unsorted, as in the official file


def write_jpeg(file, seed):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)


def pixels(file):
    """(3, H, W), without asking Pillow for any conversion."""
    with Image.open(file) as image:
        raw = np.asarray(image)
        assert image.mode == ("L" if raw.ndim == 2 else "RGB")
    return np.stack([raw] * 3) if raw.ndim == 2 else raw.transpose(2, 0, 1)


@pytest.fixture
def root(tmp_path):
    """A miniature of the official layout: 3 classes, 2 training images each, 4 validation images."""
    write_archive_folder(tmp_path / "tiny-imagenet-200")
    return tmp_path


def write_archive_folder(source):
    for seed, wnid in enumerate(WNIDS):
        for i in range(2):
            write_jpeg(source / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 10 * seed + i)
        (source / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    (source / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    for i in range(4):
        write_jpeg(source / "val" / "images" / f"val_{i}.JPEG", 100 + i)
    (source / "val" / "val_annotations.txt").write_text(
        "val_0.JPEG\tn20\t0\t0\t7\t7\nval_3.JPEG\tn30\t0\t0\t7\t7\nval_1.JPEG\tn10\t0\t0\t7\t7\nval_2.JPEG\tn10\t0\t0\t7\t7\n"
    )


def assert_is_the_miniature(data, root):
    source = root / "tiny-imagenet-200"
    train = [source / "train" / wnid / "images" / f"{wnid}_{i}.JPEG" for wnid in sorted(WNIDS) for i in range(2)]
    test = [source / "val" / "images" / f"val_{i}.JPEG" for i in (0, 3, 1, 2)]
    assert data.classes == ("n10", "n20", "n30")
    np.testing.assert_array_equal(data.train.images.numpy(), [pixels(file) for file in train])
    np.testing.assert_array_equal(data.test.images.numpy(), [pixels(file) for file in test])
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.test.labels.tolist() == [1, 2, 0, 0]


def cache_files(root):
    return sorted((root / "tiny-imagenet-200-cache").iterdir())


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"needs the TinyImageNet sample at {SAMPLE} (set CERTTRAIN_DATA)")
def test_the_sample_of_the_official_archive_is_read_pixel_by_pixel(tmp_path):
    (tmp_path / "tiny-imagenet-200").symlink_to(SAMPLE)  # so that the cache is written here, not beside the sample
    data = load_dataset("tinyimagenet", tmp_path)
    assert (len(data.train), len(data.test)) == (400, 200)
    assert data.image_shape == (3, 64, 64)
    assert data.classes == tuple(sorted(folder.name for folder in (SAMPLE / "train").iterdir()))
    assert data.mean == (0.4802, 0.4481, 0.3975)
    assert data.std == (0.2302, 0.2265, 0.2262)

    grey = 0
    for label, wnid in enumerate(data.classes):
        files = sorted((SAMPLE / "train" / wnid / "images").iterdir())
        chosen = data.train.labels == label
        images = data.train.images[chosen].numpy()
        for image, file in zip(images, files, strict=True):
            np.testing.assert_array_equal(image, pixels(file))
            with Image.open(file) as opened:
                grey += opened.mode == "L"
    assert grey == 5, "the sample has grey training images, and they are among those compared"

    annotations = [line.split("\t") for line in (SAMPLE / "val" / "val_annotations.txt").read_text().splitlines()]
    for image, label, (name, wnid, *_) in zip(data.test.images, data.test.labels, annotations, strict=True):
        assert data.classes[label] == wnid
        np.testing.assert_array_equal(image.numpy(), pixels(SAMPLE / "val" / "images" / name))


def test_the_first_load_decodes_and_the_second_maps_the_cache(root, monkeypatch):
    assert_is_the_miniature(load_dataset("tinyimagenet", root), root)
    assert [file.suffix for file in cache_files(root)] == [".npy", ".npy"]
    monkeypatch.setattr(tinyimagenet, "decode_images", lambda *_: pytest.fail("decoded in spite of the cache"))
    assert_is_the_miniature(load_dataset("tinyimagenet", root), root)


def test_writing_to_a_loaded_tensor_leaves_the_cache_alone(root):
    load_dataset("tinyimagenet", root)
    load_dataset("tinyimagenet", root).train.images.zero_()
    assert_is_the_miniature(load_dataset("tinyimagenet", root), root)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_cache_is_rebuilt(root, keep):
    load_dataset("tinyimagenet", root)
    for file in cache_files(root):
        file.write_bytes(file.read_bytes()[:keep])
    assert_is_the_miniature(load_dataset("tinyimagenet", root), root)
    assert all(np.load(file).shape[1:] == (3, 8, 8) for file in cache_files(root))


def test_a_stale_cache_is_replaced(root):
    load_dataset("tinyimagenet", root)
    before = cache_files(root)
    changed = root / "tiny-imagenet-200" / "train" / "n10" / "images" / "n10_0.JPEG"
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(changed)
    data = load_dataset("tinyimagenet", root)
    assert_is_the_miniature(data, root)
    assert data.train.images[0].max() == 0
    after = cache_files(root)
    assert len(after) == 2
    assert len(set(before) & set(after)) == 1, "the untouched split keeps its cache"


def test_an_unwritable_cache_is_a_warning(root):
    (root / "tiny-imagenet-200-cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="no cache written"):
        data = load_dataset("tinyimagenet", root)
    assert_is_the_miniature(data, root)


def test_an_interrupted_cache_leaves_nothing_behind(root, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_dataset("tinyimagenet", root)
    assert cache_files(root) == []
    assert_is_the_miniature(load_dataset("tinyimagenet", root), root)


def test_missing_data_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"data\.download=true") as caught:
        load_dataset("tinyimagenet", tmp_path)
    assert str(tmp_path / "tiny-imagenet-200") in str(caught.value)


@pytest.mark.parametrize(
    "missing", ["wnids.txt", "val/val_annotations.txt", "val/images/val_2.JPEG", "train/n20/images/n20_*.JPEG"]
)
def test_a_missing_part_is_named(root, missing):
    for file in (root / "tiny-imagenet-200").glob(missing):
        file.unlink()
    with pytest.raises(DataError, match=missing.split("/")[-1].split("_*")[0]):
        load_dataset("tinyimagenet", root)


@pytest.mark.parametrize("line", ["val_0.JPEG", "val_0.JPEG\tn99\t0\t0\t7\t7", "val_0.JPEG n10 0 0 7 7"])
def test_a_broken_annotation_is_named(root, line):
    (root / "tiny-imagenet-200" / "val" / "val_annotations.txt").write_text(f"val_1.JPEG\tn10\t0\t0\t7\t7\n{line}\n")
    with pytest.raises(DataError, match=r"val_annotations\.txt, line 2"):
        load_dataset("tinyimagenet", root)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A zip of the miniature, passed off as the official one by a server of this machine."""
    write_archive_folder(tmp_path / "made" / "tiny-imagenet-200")
    file = tmp_path / "made" / "official.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for member in sorted((tmp_path / "made").rglob("*")):
            if member != file:
                archive.write(member, member.relative_to(tmp_path / "made"))
    pass_off(file, monkeypatch)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=file.parent)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(tinyimagenet, "URL", f"http://127.0.0.1:{server.server_port}/{file.name}")
        yield file
        server.shutdown()


def pass_off(file, monkeypatch):
    monkeypatch.setattr(tinyimagenet, "MD5", hashlib.md5(file.read_bytes()).hexdigest())


def test_download_extracts_the_archive_and_leaves_nothing_else(tmp_path, archive):
    root = tmp_path / "new" / "data"
    assert_is_the_miniature(load_dataset("tinyimagenet", root, download=True), root)
    assert {entry.name for entry in root.iterdir()} == {"tiny-imagenet-200", "tiny-imagenet-200-cache"}


def test_an_archive_in_place_needs_no_download(tmp_path, archive, monkeypatch):
    monkeypatch.setattr(tinyimagenet, "URL", "file:///nowhere")
    root = tmp_path / "data"
    root.mkdir()
    archive.rename(root / "tiny-imagenet-200.zip")
    assert_is_the_miniature(load_dataset("tinyimagenet", root), root)


def test_an_archive_with_a_wrong_md5_is_refused(tmp_path, archive):
    archive.write_bytes(archive.read_bytes()[:-1])
    root = tmp_path / "data"
    with pytest.raises(DataError, match="md5"):
        load_dataset("tinyimagenet", root, download=True)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("name", ["../outside.txt", "tiny-imagenet-200/../../outside.txt", "/tmp/outside.txt"])
def test_an_archive_that_reaches_outside_is_refused(tmp_path, archive, monkeypatch, name):
    with zipfile.ZipFile(archive, "a") as members:
        members.writestr(name, "harm")
    pass_off(archive, monkeypatch)
    root = tmp_path / "data"
    with pytest.raises(DataError, match="outside"):
        load_dataset("tinyimagenet", root, download=True)
    assert list(root.iterdir()) == []


def test_a_failed_download_is_a_data_error(tmp_path, archive):
    archive.unlink()
    with pytest.raises(DataError, match="could not download"):
        load_dataset("tinyimagenet", tmp_path / "data", download=True)

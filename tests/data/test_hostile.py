"""Files that are not what they seem: refused by name, or read as what they show; never waited for, never clipped."""

import io
import json
import os
import struct
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from certtrain.data import decoding, load_dataset
from certtrain.data.decoding import decode_images
from certtrain.errors import DataError

RGB = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two classes of two training images, and a test image."""
    for place in ("train/ape/1", "train/ape/2", "train/bee/1", "test/ape/1"):
        file = tmp_path / f"{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RGB).save(file)
    return tmp_path


def refused(folder):
    with pytest.raises(DataError) as caught:
        load_dataset("folder", path=folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what an image holds ----------------------------------------------------------------------------------------------


def image_of(mode):
    """An image of `mode` whose channels use their whole range."""
    if mode in ("I", "I;16", "I;16B"):
        return Image.fromarray(
            np.random.randint(0, 2**16, (6, 4)).astype({"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[mode])
        )
    if mode == "F":
        return Image.fromarray(np.random.random((6, 4)).astype(np.float32))
    return Image.fromarray(RGB).convert(mode)


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", "png"), ("I", "tif"), ("I;16", "tif"), ("I;16B", "tif"),
                                              ("F", "tif"), ("LAB", "tif")])  # fmt: skip
def test_more_than_8_bits_are_refused_by_name(tmp_path, mode, suffix):
    file = tmp_path / f"deep.{suffix}"
    image_of(mode).save(file)
    with pytest.raises(DataError, match=rf"deep\.{suffix} cannot be decoded: its pixels have more than 8 bits"):
        decode_images([file], "")


def test_colours_of_16_bits_are_refused_too(tmp_path):
    """A PNG by hand, since Pillow writes none: of every two bytes it would read the upper one and say nothing."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + bytes(range(12)) for _ in range(2))
    (tmp_path / "deep.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )  # fmt: skip
    assert Image.open(tmp_path / "deep.png").size == (2, 2)
    with pytest.raises(DataError, match="more than 8 bits"):
        decode_images([tmp_path / "deep.png"], "")


def test_a_bitmap_has_no_largest_value(tmp_path):
    (tmp_path / "map.pbm").write_bytes(b"P1\n2 1\n0 1\n")
    assert decode_images([tmp_path / "map.pbm"], "").tolist() == [[[[255, 0]]] * 3]


@pytest.mark.parametrize("kind", ["P2", "P3", "P5", "P6"])
@pytest.mark.parametrize("largest", [1, 15, 254, 255, 256, 1023, 65534, 65535])
def test_what_a_portable_map_has_as_its_largest_value_decides(tmp_path, kind, largest):
    """Up to 255 it is white; a grey or a colour of more steps has more than 8 bits."""
    values = [0, largest, largest] * (2 if kind in ("P3", "P6") else 1)
    written = " ".join(map(str, values)).encode()
    if kind in ("P5", "P6"):
        written = np.array(values, ">u2" if largest > 255 else "u1").tobytes()
    file = tmp_path / "map.ppm"
    file.write_bytes(f"{kind}\n{len(values) // (3 if kind in ('P3', 'P6') else 1)} 1\n{largest}\n".encode() + written)
    if largest > 255:
        with pytest.raises(DataError, match=r"map\.ppm cannot be decoded: its pixels have more than 8 bits"):
            decode_images([file], "")
        return
    (read,) = decode_images([file], "")
    first, second = (0, 255) if kind in ("P2", "P5") else ([0, 255, 255], [0, 255, 255])
    assert (read[:, 0, 0] == first).all()
    assert (read[:, 0, 1] == second).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_8_bits_of_every_kind_are_read_as_they_look(tmp_path, mode):
    image = image_of(mode)
    image.save(tmp_path / "a.tif")
    (pixels,) = decode_images([tmp_path / "a.tif"], "")
    np.testing.assert_array_equal(pixels.transpose(1, 2, 0), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@settings(max_examples=20)
@given(position=st.integers(0, 23), alpha=st.integers(0, 255))
def test_an_image_that_is_transparent_anywhere_is_refused(tmp_path_factory, mode, position, alpha):
    file = tmp_path_factory.mktemp("alpha") / "a.png"
    opacity = np.full(24, 255, np.uint8)
    opacity[position] = alpha
    image = Image.fromarray(np.dstack([RGB, opacity.reshape(6, 4)]))
    if mode == "P":
        palette = Image.fromarray(RGB[..., 0] // 128)  # of index 0 and 1
        palette.putpalette([0, 0, 0, 255, 255, 255])
        palette.save(file, transparency=bytes([alpha, 255]))
    else:
        image.convert(mode).save(file)
    if alpha == 255:
        shown = Image.open(file).convert("RGBA")
        (pixels,) = decode_images([file], "")
        np.testing.assert_array_equal(pixels.transpose(1, 2, 0), np.asarray(shown)[..., :3])
    else:
        with pytest.raises(DataError, match=r"a\.png cannot be decoded: parts of it are transparent"):
            decode_images([file], "")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_an_image_is_turned_as_a_viewer_turns_it(tmp_path, orientation, suffix):
    """Row and column of the pixel that is stored first, by the EXIF standard's table of orientations."""
    first = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    pixels = np.zeros((16, 8, 3), np.uint8)
    pixels[:4, :4] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a.{suffix}", exif=exif)
    (read,) = decode_images([tmp_path / f"a.{suffix}"], "")
    assert read.shape[1:] == ((16, 8) if orientation <= 4 else (8, 16))
    row, column = first[orientation]
    assert read[0, row, column] > 200
    assert (read[0] > 128).sum() == 16


def test_a_file_that_claims_too_many_pixels_is_refused_before_it_is_decoded(folder, monkeypatch, recwarn):
    """A PNG header alone; and one within Pillow's own limits."""
    for width, height in ((2**30, 2**30), (12_000, 12_000), (5000, 5000)):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        content = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
        (folder / "train" / "ape" / "0.png").write_bytes(
            b"\x89PNG\r\n\x1a\n" + content + struct.pack(">I", 9) + b"IDAT"
        )
        assert "0.png cannot be decoded" in refused(folder)
    assert not recwarn.list
    monkeypatch.setattr(decoding.psutil, "virtual_memory", lambda: SimpleNamespace(total=64))
    (folder / "train" / "ape" / "0.png").unlink()
    assert "this machine has" in refused(folder)


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 6\n", b"GIF89a", b"",
                                     b"\x89PNG\r\n\x1a\n", b"P6 4 6 255\n", b"P6 99999999999 9 9\n",
                                     b"BM" + b"\xff" * 60, b"II*\0" + b"\xff" * 60])  # fmt: skip
def test_a_file_of_another_format_is_named_and_starts_no_program(folder, content):
    (folder / "train" / "ape" / "0.png").write_bytes(content)
    assert "0.png cannot be decoded" in refused(folder)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 255), st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"]))
def test_a_damaged_byte_is_an_image_or_one_line(tmp_path_factory, position, byte, kind):
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    content[position % len(content)] = byte
    file = tmp_path_factory.mktemp("damaged") / "a.png"
    file.write_bytes(content)
    try:
        pixels = decode_images([file], "")
    except DataError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either is fine
    else:
        assert pixels.dtype == np.uint8


# --- what a folder holds ----------------------------------------------------------------------------------------------


def test_hidden_files_and_folders_are_passed_over(folder):
    expected = load_dataset("folder", path=folder)
    for hidden in ("train/.ipynb_checkpoints", "train/ape/.ipynb_checkpoints", ".git", "test/.cache"):
        (folder / hidden).mkdir()
        Image.fromarray(RGB).save(folder / hidden / "1.png")
    (folder / "train" / "ape" / "._1.png").write_bytes(b"resource fork")
    data = load_dataset("folder", path=folder)
    assert data.classes == expected.classes == ("ape", "bee")
    np.testing.assert_array_equal(data.train.images.numpy(), expected.train.images.numpy())


@pytest.mark.parametrize("name", ["x.gif", "x.JFIF", "1/x.avif", "x.jpe"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_images_in_other_formats_are_not_left_out_silently(folder, part, name):
    file = folder / part / "ape" / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"")
    assert f"{file} is in a format that is not read: convert it to PNG" in refused(folder)


@pytest.mark.parametrize("name", ["notes.txt", "Thumbs.db", ".x.gif"])
def test_files_that_are_no_images_are_passed_over(folder, name):
    (folder / "train" / "ape" / name).write_bytes(b"")
    assert len(load_dataset("folder", path=folder).train) == 3


@pytest.mark.parametrize("suffix", ["tif", "png", "webp"])
@pytest.mark.parametrize("count", [2, 5])
def test_a_file_of_several_images_is_not_read_as_its_first(folder, suffix, count):
    file = folder / "train" / "ape" / f"stack.{suffix}"
    frames = [Image.fromarray(np.random.randint(0, 256, (6, 4, 3), dtype=np.uint8)) for _ in range(count)]
    frames[0].save(file, save_all=True, append_images=frames[1:])
    assert f"{file} cannot be decoded: it holds {count} images" in refused(folder)


def test_the_previews_of_a_photograph_are_passed_over(folder):
    image, preview = Image.fromarray(RGB), Image.fromarray(RGB[:2])
    image.save(folder / "train" / "ape" / "photo.jpg", format="mpo", save_all=True, append_images=[preview])
    assert len(load_dataset("folder", path=folder).train) == 4


def test_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "train" / "ape" / "0.png")
    assert "0.png is missing or no regular file" in refused(folder)


@pytest.mark.parametrize("target", ["0.png", "/dev/null", "nowhere", "."])
def test_a_link_to_no_regular_file_is_named(folder, target):
    (folder / "train" / "ape" / "0.png").symlink_to(target)
    message = refused(folder)
    assert "0.png is missing or no regular file" in message or "0.png is a link to a folder" in message


@pytest.mark.parametrize("target", [".", "..", "../..", "/proc/self", "/dev", "/"])
def test_links_to_folders_below_a_class_are_refused(folder, target):
    (folder / "train" / "ape" / "more").symlink_to(target)
    assert "more is a link to a folder" in refused(folder)


@pytest.mark.parametrize("target", [".", "..", "/proc/self", "/sys", "/dev"])
def test_a_class_that_is_a_link_round_in_a_circle_or_to_devices_ends(folder, target):
    (folder / "train" / "cow").symlink_to(target)
    if target in (".", ".."):
        (folder / "train" / "dog").symlink_to(".")  # with nothing but regular folders in it, it is a class as any
    message = refused(folder)
    assert "is a link to a folder" in message or "holds no images" in message


def test_a_class_and_an_image_may_be_links(folder):
    (folder / "elsewhere").mkdir()
    Image.fromarray(RGB).save(folder / "elsewhere" / "1.png")
    (folder / "train" / "cow").symlink_to(folder / "elsewhere")
    (folder / "train" / "ape" / "3.png").symlink_to(folder / "elsewhere" / "1.png")
    data = load_dataset("folder", path=folder)
    assert data.classes == ("ape", "bee", "cow")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 2]


def test_one_class_is_not_a_data_set(folder, tmp_path):
    (folder / "train" / "bee" / "1.png").unlink()
    (folder / "train" / "bee").rmdir()
    assert "all 2 training images have the label 0: there is nothing to tell apart" in refused(folder)
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", images=np.random.randint(0, 256, (5, 4, 4), np.uint8), labels=np.full(5, 3))
    with pytest.raises(DataError, match="all 5 training images have the label 3"):
        load_dataset("npz", path=tmp_path)


def test_a_limit_that_leaves_one_class_is_refused(train, tmp_path):
    for part in ("train", "test"):
        np.savez(
            tmp_path / f"{part}.npz", images=np.random.randint(0, 256, (40, 8, 8), np.uint8), labels=np.arange(40) // 20
        )
    outcome = train("data.name=npz", f"data.path={tmp_path}", "data.limit=15")
    assert (outcome.code, "nothing to tell apart" in outcome.error) == (1, True)


# --- what an archive holds --------------------------------------------------------------------------------------------


def write_npz(folder, **members):
    """train.npz and test.npz with members of raw bytes."""
    for part in ("train", "test"):
        with zipfile.ZipFile(folder / f"{part}.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(f"{name}.npy", content)


def npy(array=None, header=None, allow_pickle=False):
    if header is not None:
        text = header.encode()
        return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize(
    "images",
    [
        npy(np.array([Trap()], dtype=object), allow_pickle=True),
        npy(header="{'descr': '|u1', 'fortran_order': False, 'shape': (999999999999, 8, 8, 3), }\n"),
        npy(header="{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8), }\n"),
        npy(header="{'descr': '|u1', 'fortran_order': False, 'shape': (2, 8, 8), }" + " " * 10**6 + "\n"),
        npy(header="[" * 9000),
        npy(header="{'descr': '|O', 'fortran_order': False, 'shape': (2, 8, 8), }\n"),
        npy(header="{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (2,), }\n") + b"ab",
        b"",
        b"\x80\x04.",
    ],
)
def test_arrays_that_are_traps_are_refused(tmp_path, monkeypatch, images):
    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path, images=images, labels=npy(np.array([0, 1])))
    with pytest.raises(DataError, match=r"train\.npz") as caught:
        load_dataset("npz", path=tmp_path)
    assert len(str(caught.value)) - len(str(tmp_path)) <= 300
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def test_an_archive_larger_than_all_memory_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    write_npz(tmp_path, images=npy(np.full((500, 8, 8), 255, np.uint8)), labels=npy(np.arange(500) % 2))
    assert len(load_dataset("npz", path=tmp_path).train) == 500
    monkeypatch.setattr(decoding.psutil, "virtual_memory", lambda: SimpleNamespace(total=10_000))
    with pytest.raises(DataError, match=r"train\.npz: its arrays take .* this machine has"):
        load_dataset("npz", path=tmp_path)


def test_a_pipe_is_no_archive(tmp_path):
    os.mkfifo(tmp_path / "train.npz")
    with pytest.raises(DataError, match=r"train\.npz is missing"):
        load_dataset("npz", path=tmp_path)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_is_images_of_one_pixel(tmp_path):
    table = np.random.randint(0, 256, (30, 7), dtype=np.uint8)
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", images=table, labels=np.arange(30) % 3)
    data = load_dataset("npz", path=tmp_path)
    assert data.image_shape == (7, 1, 1)
    np.testing.assert_array_equal(data.train.images.numpy()[:, :, 0, 0], table)
    assert (len(data.mean), data.num_classes) == (7, 3)


def test_a_network_of_linear_layers_trains_on_a_table_and_is_verified(cli, tmp_path):
    """The sum of two features decides; the others are noise."""
    for part, count in (("train", 400), ("test", 80)):
        table = np.random.randint(0, 256, (count, 6), dtype=np.uint8)
        decided = table[:, 0].astype(int) + table[:, 1] > 255
        np.savez(tmp_path / f"{part}.npz", images=table, labels=decided.astype(int))
    overrides = ["data.name=npz", f"data.path={tmp_path}", "model={name: mlp, options: {widths: [16]}}",
                 "epsilon.max=0.01", "epsilon.warmup_epochs=2", "training.epochs=8", "optimizer.lr=0.02",
                 "optimizer.milestones=[]"]  # fmt: skip
    outcome = cli("train", "digits", *overrides, "--out", tmp_path / "run", "--device", "cpu")
    assert (outcome.code, outcome.err) == (0, "")
    outcome = cli("verify", tmp_path / "run", "--eps", "0.001", "--json", tmp_path / "small.json")
    assert outcome.code == 0
    small = json.loads((tmp_path / "small.json").read_text())
    assert small["natural_error"] <= small["verified_error"] < 0.3
    assert cli("report", tmp_path / "run", "--limit", 20).code == 0

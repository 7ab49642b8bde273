"""The one decoder: every mode of picture, what is no picture, and what must not be opened at all."""

import io
import os
import socket
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bsap_utils.datasets import DatasetError, open_picture, write_file

RAMP = np.add.outer(np.arange(0, 120, 3), np.arange(0, 135, 3)).astype(np.uint8)  # 40 × 45, 0 to 249


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


DEEP = {
    "PNG of 16 bits": (RAMP.astype(np.uint16) * 257, "PNG"),
    "TIFF of 16 bits": (RAMP.astype(np.uint16) * 257, "TIFF"),
    "TIFF of 32 bits, 16 of them used": (RAMP.astype(np.int32) * 257, "TIFF"),
    "TIFF of 32 bits": (RAMP.astype(np.int32) * (2**23), "TIFF"),
    "floats to 1": (RAMP.astype(np.float32) / 255, "TIFF"),
    "floats to 255": (RAMP.astype(np.float32), "TIFF"),
    "floats to 65,535": (RAMP.astype(np.float32) * 257, "TIFF"),
    "PGM of 16 bits": (RAMP.astype(np.uint16) * 257, "PPM"),
}
SCALED = (
    "PNG of 16 bits",
    "TIFF of 16 bits",
    "floats to 1",
)  # by the most they can hold, all else by the most it holds


@pytest.mark.parametrize("name", DEEP)
def test_deep_pictures_keep_their_light(name):
    array, kind = DEEP[name]
    picture = open_picture(encoded(Image.fromarray(array), kind))
    top = 255 if name in SCALED else RAMP.max()
    assert picture.mode == "RGB" and picture.size == (45, 40)
    assert np.abs(np.asarray(picture)[..., 0] - RAMP * (255 / top)).max() <= 1


@pytest.mark.parametrize("array", [np.full((3, 4), np.nan, np.float32), np.full((3, 4), -5, np.int32)])
def test_odd_numbers_are_black(array):
    assert not np.asarray(open_picture(Image.fromarray(array))).any()


def test_infinity_does_not_hide_the_rest():
    picture = open_picture(Image.fromarray(np.array([[np.inf, 0.5, -np.inf, 1]], np.float32)))
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 128, 0, 255]


def test_every_mode_is_that_of_convert():
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 8, 4), dtype=np.uint8), "RGBA")
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA", "HSV"):
        image = colours.convert("RGB").convert(mode) if mode in ("P", "CMYK", "YCbCr", "HSV") else colours.convert(mode)
        assert (np.asarray(open_picture(image)) == np.asarray(image.convert("RGB"))).all(), mode


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    options = {"save_all": True, "append_images": frames[1:]} | ({"lossless": True} if kind == "WEBP" else {})
    assert open_picture(encoded(frames[0], kind, **options)).getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])  # TIFF is always turned by Pillow
def test_exif_turns_a_picture_only_where_it_is_asked_for(kind, tmp_path):
    upright = Image.fromarray(np.dstack([RAMP, RAMP[::-1], RAMP]))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "phone"
    path.write_bytes(encoded(upright.transpose(Image.Transpose.ROTATE_90), kind, exif=exif))
    raw, turned = open_picture(path), open_picture(path, upright=True)
    assert raw.size == (40, 45) and turned.size == (45, 40)
    assert np.abs(np.asarray(turned, int) - np.asarray(upright, int)).mean() < 3
    assert open_picture(raw, upright=True).size == raw.size  # whoever gets pixels does not turn them again
    assert open_picture(turned, upright=True).size == turned.size
    assert open_picture(Image.open(path), upright=True).size == (45, 40)


def test_all_kinds_of_source(tmp_path):
    content = encoded(Image.new("RGB", (3, 2), "navy"))
    (tmp_path / "a.png").write_bytes(content)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), content, Image.new("RGB", (3, 2))):
        assert open_picture(source).size == (3, 2)


def test_other_formats_are_not_opened(tmp_path, monkeypatch):
    """Pillow would start Ghostscript for EPS, whatever the name of the file."""
    monkeypatch.setattr("subprocess.check_call", lambda *_: pytest.fail("a program was started"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.jpg").write_bytes(eps)
    for source in (tmp_path / "a.jpg", eps, b"", b"GIF89a", b"text", encoded(Image.new("RGB", (4, 4)), "PCX")):
        with pytest.raises(DatasetError, match="cannot be read.*Pass a whole picture"):
            open_picture(source)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    for path in (tmp_path / "fifo", tmp_path / "socket", "/dev/zero", tmp_path):
        reader = threading.Thread(target=lambda path=path: pytest.raises(DatasetError, open_picture, path), daemon=True)
        reader.start()
        reader.join(5)
        assert not reader.is_alive(), f"hangs at {path}"
        with pytest.raises(DatasetError, match="regular file"):
            open_picture(path)
    with pytest.raises(DatasetError, match=r"nothing\.jpg cannot be read"):
        open_picture(tmp_path / "nothing.jpg")
    server.close()


def test_a_small_file_of_very_many_pixels_is_refused():
    bomb = bytearray(encoded(Image.new("1", (8, 8))))
    bomb[16:24] = (30_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(DatasetError, match="cannot be read.*pixels"):
        open_picture(bytes(bomb))
    assert 2 * Image.MAX_IMAGE_PIXELS == 178_956_970


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"]))
@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL on damaged TIFF tags
def test_damaged_pictures_end_as_errors_or_pictures(data, kind):
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    damaged = bytearray(encoded(Image.fromarray(pixels), kind))
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, min(200, len(damaged) - 1)))] = data.draw(st.integers(0, 255))
    try:
        picture = open_picture(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]), upright=True)
    except DatasetError:
        return
    assert picture.mode == "RGB"


# Files are written whole or not at all


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "a.png"
    write_file(path, b"one")
    write_file(path, lambda part: part.write_bytes(b"two") and part.suffix == ".png" or pytest.fail("another suffix"))
    assert path.read_bytes() == b"two"
    with pytest.raises(ZeroDivisionError):
        write_file(path, lambda part: part.write_bytes(b"half") / 0)
    assert path.read_bytes() == b"two" and os.listdir(path.parent) == ["a.png"]


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    for name in ("link", "dead", "."):
        with pytest.raises(DatasetError, match="stays as it is"):
            write_file(tmp_path / name, b"yours")
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "nowhere").exists()


def test_two_processes_do_not_share_a_temporary_name(tmp_path, monkeypatch):
    names = []
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        write_file(tmp_path / "a.npy", lambda part: (names.append(part.name), part.write_bytes(b"")))
    assert len(set(names)) == 2 and all(name.startswith(".") and ".part" in name for name in names)

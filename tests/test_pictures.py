"""Any picture file to the RGB a person sees, against formulas in float64 and against Pillow's own colour management."""

from __future__ import annotations

import io
import struct
import zlib
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from test_data import HEIC

from dora_diffusion.data.folder import read_folder
from dora_diffusion.data.pictures import open_image, read_picture
from dora_diffusion.errors import DataError
from dora_diffusion.webapp.uploads import thumbnail

RAMP = np.linspace(0, 1, 32 * 32).reshape(32, 32)
D50 = np.array([0.9642, 1.0, 0.8249])
SRGB = ((0.3127, 0.3290), (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
P3 = ((0.3127, 0.3290), (0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE = ((0.3127, 0.3290), (0.64, 0.33), (0.21, 0.71), (0.15, 0.06))


def decoded(v: np.ndarray) -> np.ndarray:
    """sRGB's numbers, 0 to 1, as light."""
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def encoded(light: np.ndarray) -> np.ndarray:
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def to_xyz(points: tuple[tuple[float, float], ...]) -> np.ndarray:
    white, *primaries = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in points)
    columns = np.array(primaries).T
    return columns * np.linalg.solve(columns, white)


def in_srgb(light: np.ndarray, points: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Light by these primaries, whose white is sRGB's, as sRGB's numbers 0 to 255."""
    return encoded(light @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(points)).T)


def icc_profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A profile of version 2 with these tags."""
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"cprt": b"text" + bytes(5),
    } | tags
    table, data, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += name + struct.pack(">II", at + len(data), len(value))
        data += value
    body = struct.pack(">I", len(tags)) + table + data
    head = struct.pack(">I4sI4s4s4s", 128 + len(body), b"lcms", 0x02400000, b"prtr", space, b"Lab ")
    head = head.replace(b"Lab ", b"Lab " if space == b"CMYK" else b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", *np.rint(D50 * 65536).astype(int)) + bytes(48)
    return head[:128] + body


def xyz_tag(value: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *np.rint(value * 65536).astype(int))


def grey_profile(gamma: float) -> bytes:
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    return icc_profile(b"GRAY", {b"wtpt": xyz_tag(D50), b"kTRC": curve})


def cmyk_profile(corner: Callable[[tuple[int, ...]], tuple[float, float, float]]) -> bytes:
    """Lab between the sixteen mixtures of full inks, each given by `corner`."""
    head = b"mft2" + bytes(4) + bytes((4, 3, 2, 0)) + struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).ravel())
    table = head + struct.pack(">HH", 2, 2) + struct.pack(">2H", 0, 65535) * 4
    for inks in np.ndindex(2, 2, 2, 2):
        lightness, a, b = corner(inks)
        table += struct.pack(">3H", round(lightness * 652.8), round((a + 128) * 256), round((b + 128) * 256))
    table += struct.pack(">2H", 0, 65535) * 3
    return icc_profile(b"CMYK", {b"wtpt": xyz_tag(D50), b"A2B0": table, b"A2B1": table})


def png(bits: int, kind: int, row: bytes, width: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of one row, written by hand: Pillow writes few of its forms."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0))
    rest = b"".join(chunk(*each) for each in chunks)
    return b"\x89PNG\r\n\x1a\n" + head + rest + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(open_image(path)).astype(np.float64)


def greys(path: Path) -> np.ndarray:
    """One band of a picture that must be grey."""
    array = pixels(path)
    assert (array == array[..., :1]).all()
    return array[..., 0]


@pytest.mark.parametrize(
    ("name", "image", "options"),
    [
        ("a.png", np.rint(RAMP * 65535).astype(np.uint16), {}),
        ("a.tif", np.rint(RAMP * 65535).astype(np.uint16), {}),
        ("big.tif", np.rint(RAMP * 65535).astype(">u2"), {}),
        ("packed.tif", np.rint(RAMP * 65535).astype(np.uint16), {"compression": "tiff_lzw"}),
        ("whole.tif", np.rint(RAMP * 65535).astype(np.int32), {}),
        ("floating.tif", RAMP.astype(np.float32), {}),
    ],
)
def test_greys_of_more_than_eight_bits_keep_their_range(
    tmp_path: Path, name: str, image: np.ndarray, options: dict[str, str]
) -> None:
    Image.fromarray(image).save(tmp_path / name, **options)
    assert np.abs(greys(tmp_path / name) - RAMP * 255).max() <= 0.51


@pytest.mark.parametrize("values", [np.rint(RAMP * 65535).astype(np.uint16), RAMP.astype(np.float32)])
def test_a_tiff_in_which_nought_is_white_is_turned_round(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert np.abs(greys(tmp_path / "a.tif") - (1 - RAMP) * 255).max() <= 0.51


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (RAMP.astype(np.float32) * 255, "values from 0 to 255 in floating point"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "nan"),
        (np.rint(RAMP * 255).astype(np.int32), "values from 0 to 255 in signed whole numbers of 32 bits"),
        (np.rint(RAMP * 2**31 - 1).astype(np.int32), "do not say what white is"),
        (np.rint(RAMP * 9 - 3).astype(np.int32), "values from -3 to 6"),
    ],
)
def test_numbers_that_do_not_say_what_white_is_are_refused(tmp_path: Path, values: np.ndarray, said: str) -> None:
    Image.fromarray(values).save(tmp_path / "scan.tif")
    with pytest.raises(DataError, match=r"scan\.tif") as refused:
        open_image(tmp_path / "scan.tif")
    assert said in str(refused.value) and "8 or 16 bits" in str(refused.value)


@pytest.mark.parametrize(
    ("bits", "kind", "row", "clear", "expected"),
    [
        (16, 0, struct.pack(">4H", 0, 1, 32768, 65535), (1,), [0, 255, 128, 255]),
        (16, 0, struct.pack(">4H", 0, 1, 32768, 65535), (32768,), [0, 0, 255, 255]),
        (2, 0, bytes([0b00011011]), (1,), [0, 255, 170, 255]),
        (4, 0, bytes([0x01, 0x7F]), (7,), [0, 17, 255, 255]),
        (1, 0, bytes([0b01010000]), (0,), [255, 255, 255, 255]),
        (8, 0, bytes([0, 9, 90, 255]), (9,), [0, 255, 90, 255]),
        (
            16,
            2,
            struct.pack(">12H", *[0] * 3, *[0x1234] * 3, *[0x8080] * 3, *[65535] * 3),
            (0x1234,) * 3,
            [0, 255, 128, 255],
        ),
    ],
)
def test_the_colour_that_is_transparent_is_found_in_every_depth(
    tmp_path: Path, bits: int, kind: int, row: bytes, clear: tuple[int, ...], expected: list[int]
) -> None:
    (tmp_path / "a.png").write_bytes(png(bits, kind, row, 4, (b"tRNS", struct.pack(f">{len(clear)}H", *clear))))
    assert greys(tmp_path / "a.png")[0].tolist() == expected


def colours() -> np.ndarray:
    """[16, 16, 3], colours all over the cube, the corners among them."""
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def test_display_p3_comes_out_in_srgb(tmp_path: Path, shared_p3: bytes) -> None:
    """A phone's profile: by the formula, from light by P3's primaries; colours that sRGB lacks are its nearest."""
    array = colours()
    Image.fromarray(array).save(tmp_path / "phone.png", icc_profile=shared_p3)
    expected = in_srgb(decoded(array / 255), P3)
    assert np.abs(pixels(tmp_path / "phone.png") - expected).max() <= 1.6
    assert np.abs(array - expected).max() > 40  # it would have been seen


@pytest.fixture
def shared_p3() -> bytes:
    """Display P3 as Apple's profile has it: matrix and curve, under D50."""
    white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    adapt = np.linalg.inv(bradford) @ np.diag((bradford @ D50) / (bradford @ white)) @ bradford
    red, green, blue = (adapt @ to_xyz(P3)).T
    curve = (
        b"para"
        + bytes(4)
        + struct.pack(">HH5i", 3, 0, *(round(v * 65536) for v in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
    )
    return icc_profile(
        b"RGB ",
        {b"wtpt": xyz_tag(D50), b"rXYZ": xyz_tag(red), b"gXYZ": xyz_tag(green), b"bXYZ": xyz_tag(blue)}
        | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    )


@pytest.mark.parametrize("mode", ["RGBA", "P", "L"])
def test_a_profile_counts_in_every_mode(tmp_path: Path, shared_p3: bytes, mode: str) -> None:
    array = colours()
    image = Image.fromarray(array)
    if mode == "RGBA":
        image.putalpha(128)
    image = image.convert("L") if mode == "L" else image.quantize(64) if mode == "P" else image
    image.save(tmp_path / "a.png", icc_profile=shared_p3)
    plain = np.asarray(image.convert("RGB")) / 255
    expected = in_srgb(decoded(plain), P3)
    expected = expected * 128 / 255 + 127 if mode == "RGBA" else expected
    assert np.abs(pixels(tmp_path / "a.png") - expected).max() <= 2


def test_a_grey_profile_is_heeded(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.jpg", quality=100, icc_profile=grey_profile(1.0))
    stored = np.asarray(Image.open(tmp_path / "a.jpg")) / 255
    assert np.abs(greys(tmp_path / "a.jpg") - encoded(stored)).max() <= 2.5
    assert greys(tmp_path / "a.jpg").mean() > 160  # linear light is brighter on a screen


def test_inks_are_those_of_the_profile(tmp_path: Path) -> None:
    """A press that prints no black and whose yellow is green: seen in the corners, which interpolate nothing."""

    def corner(inks: tuple[int, ...]) -> tuple[float, float, float]:
        cyan, magenta, yellow, _ = inks
        return 100 - 20 * cyan - 20 * magenta - 20 * yellow, 20.0 * magenta - 30 * yellow, -20.0 * cyan + 10 * yellow

    image = Image.new("CMYK", (32, 16))
    image.paste((0, 255, 0, 0), (0, 0, 16, 16))
    image.paste((0, 0, 255, 0), (16, 0, 32, 16))
    profile = cmyk_profile(corner)
    for name in ("press.tif", "press.jpg"):  # Pillow writes JPEG's inks as Adobe does, the other way round
        image.save(tmp_path / name, icc_profile=profile, **({"quality": 100} if name.endswith("jpg") else {}))
        array = pixels(tmp_path / name)
        for at, lab in ((4, corner((0, 1, 0, 0))), (28, corner((0, 0, 1, 0)))):
            assert np.abs(array[8, at] - srgb_of_lab(*lab)).max() <= 3, (name, at)
        assert not read_picture(tmp_path / name).notes


def srgb_of_lab(lightness: float, a: float, b: float) -> np.ndarray:
    """CIE Lab under D50 as sRGB's numbers, by Lindbloom's matrix for D50."""
    y = (lightness + 16) / 116
    f = np.array([y + a / 500, y, y - b / 200])
    xyz = D50 * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    matrix = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    return encoded(np.array(matrix) @ xyz)


def test_lab_is_read(tmp_path: Path) -> None:
    Image.new("LAB", (16, 16), (128, 128 + 20, 128 - 30)).save(tmp_path / "a.tif")
    assert np.abs(pixels(tmp_path / "a.tif")[0, 0] - srgb_of_lab(128 / 2.55, 20, -30)).max() <= 1.6


def test_inks_without_a_profile_are_read_and_said(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=100)
    picture = read_picture(tmp_path / "a.jpg")
    assert np.abs(np.subtract(picture.image.getpixel((3, 3)), (0, 255, 255))).max() <= 2
    assert "CMYK without a colour profile" in picture.notes[0]


@pytest.mark.parametrize("profile", [b"no profile at all" * 20, grey_profile(2.2)])
def test_a_profile_that_cannot_be_used_is_said_and_named(tmp_path: Path, profile: bytes) -> None:
    Image.fromarray(colours()).save(tmp_path / "odd.png", icc_profile=profile)
    (tmp_path / "odd.txt").write_text("a cat")
    assert (pixels(tmp_path / "odd.png") == colours()).all()
    [note] = read_folder(tmp_path).notes
    assert note.startswith("odd.png: colour profile that cannot be used") and note.endswith("taken as sRGB")


def test_pngs_gamma_and_primaries_are_heeded(tmp_path: Path) -> None:
    """A renderer's picture in linear light, and one by Adobe RGB's primaries, without profiles."""
    row = bytes(range(0, 240, 5))
    light = np.frombuffer(row, np.uint8).reshape(1, 16, 3) / 255
    points = struct.pack(">8I", *(round(v * 100000) for pair in ADOBE for v in pair))
    (tmp_path / "linear.png").write_bytes(png(8, 2, row, 16, (b"gAMA", struct.pack(">I", 100000))))
    (tmp_path / "adobe.png").write_bytes(png(8, 2, row, 16, (b"cHRM", points), (b"gAMA", struct.pack(">I", 45470))))
    (tmp_path / "usual.png").write_bytes(png(8, 2, row, 16, (b"gAMA", struct.pack(">I", 45455))))
    assert np.abs(pixels(tmp_path / "linear.png") - encoded(light)).max() <= 0.51
    assert np.abs(pixels(tmp_path / "adobe.png") - in_srgb(light ** (1 / 0.4547), ADOBE)).max() <= 0.51
    assert (pixels(tmp_path / "usual.png") == light * 255).all()


def test_a_cameras_mark_for_adobe_rgb_is_heeded(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    Image.new("RGB", (16, 16), (60, 200, 60)).save(tmp_path / "_DSC1.jpg", exif=exif, quality=100, subsampling=0)
    expected = in_srgb((np.array([60, 200, 60]) / 255) ** (563 / 256), ADOBE)
    assert np.abs(pixels(tmp_path / "_DSC1.jpg")[0, 0] - expected).max() <= 3


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".avif"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_in_every_format_is_as_pillow_turns_it(tmp_path: Path, suffix: str, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / f"a{suffix}"
    Image.fromarray(np.kron(colours()[:3, :4], np.ones((8, 8, 1), np.uint8))).save(path, exif=exif)
    with Image.open(path) as file:
        expected = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    assert np.array_equal(pixels(path), expected)


@pytest.mark.parametrize("value", ["2", (1, 2), b"\0\1", 2.5])
def test_odd_exif_does_not_keep_a_picture_from_being_read(tmp_path: Path, value: object) -> None:
    """Numbers as text, in pairs and in bytes, beside an orientation: what Pillow cannot write again is not written."""
    kind = {str: 2, tuple: 3, bytes: 7, float: 12}[type(value)]
    data = {str: b"2\0\0\0", tuple: struct.pack("<HH", 1, 2), bytes: b"\0\1\0\0", float: struct.pack("<I", 38)}[
        type(value)
    ]
    count = {str: 2, tuple: 2, bytes: 2, float: 1}[type(value)]
    ifd = struct.pack("<H", 2) + struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHI", 296, kind, count) + data
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + ifd + struct.pack("<I", 0) + struct.pack("<d", 2.5)
    Image.new("RGB", (32, 16)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (16, 32)


def test_exif_that_says_nothing_sensible_is_said(tmp_path: Path) -> None:
    ifd = struct.pack("<H", 1) + struct.pack("<HHI", 0x0112, 2, 2) + b"6\0\0\0"
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + ifd + struct.pack("<I", 0)
    Image.new("RGB", (32, 16)).save(tmp_path / "a.jpg", exif=exif)
    picture = read_picture(tmp_path / "a.jpg")
    assert picture.image.size == (32, 16) and "orientation that is no number ('6')" in picture.notes[0]


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_of_several_frames_the_first_is_taken_and_said(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    lossless = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], **lossless)
    picture = read_picture(tmp_path / f"a{suffix}")
    assert picture.image.getpixel((3, 3)) == (255, 0, 0) and picture.notes == ("3 frames, of which the first is taken",)


def test_transparency_of_every_kind_is_laid_on_white(tmp_path: Path) -> None:
    half = Image.new("RGBA", (16, 16), (200, 100, 0, 128))
    half.save(tmp_path / "straight.tif")
    multiplied = half.convert("RGBa")
    raw = multiplied.tobytes()
    Image.frombytes("RGBA", (16, 16), raw).save(tmp_path / "multiplied.tif")
    extra, associated = (struct.pack("<HHIHH", 338, 3, 1, kind, 0) for kind in (2, 1))
    written = (tmp_path / "multiplied.tif").read_bytes()
    assert written.count(extra) == 1
    (tmp_path / "multiplied.tif").write_bytes(written.replace(extra, associated))
    clear = Image.new("P", (16, 16), 1)
    clear.putpalette([0, 0, 0, 255, 0, 0])
    clear.save(tmp_path / "clear.png", transparency=1)
    clear.save(tmp_path / "parts.png", transparency=bytes([255, 128]))
    clear.save(tmp_path / "clear.gif", transparency=1)
    Image.new("LA", (16, 16), (0, 128)).save(tmp_path / "grey.png")
    expected = 255 - (255 - np.array([200, 100, 0])) * 128 / 255
    assert np.abs(pixels(tmp_path / "straight.tif")[0, 0] - expected).max() <= 1
    assert np.abs(pixels(tmp_path / "multiplied.tif")[0, 0] - expected).max() <= 2
    assert (pixels(tmp_path / "clear.png") == 255).all() and (pixels(tmp_path / "clear.gif") == 255).all()
    assert open_image(tmp_path / "parts.png").getpixel((0, 0)) == (255, 127, 127)
    assert open_image(tmp_path / "grey.png").getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".avif", ".bmp", ".gif", ".heic"])
def test_a_file_that_is_cut_short_is_an_error_that_names_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"holiday{suffix}"
    if suffix == ".heic":
        pytest.importorskip("pi_heif")

        path.write_bytes(b64decode(HEIC))
    else:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    whole = path.read_bytes()
    for share in (0.05, 0.3, 0.6, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError, match="holiday"):
            open_image(path)


def test_a_file_of_another_kind_is_not_given_to_a_program(tmp_path: Path) -> None:
    """Pillow reads EPS by running Ghostscript, whatever the file is called."""
    written = io.BytesIO()
    Image.new("RGB", (16, 16)).save(written, format="EPS")
    (tmp_path / "a.png").write_bytes(written.getvalue())
    with pytest.raises(DataError, match=r"a\.png is no picture"):
        open_image(tmp_path / "a.png")


def test_the_pages_small_copy_is_read_by_the_same_reader(tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 64), 40000, np.uint16)).save(tmp_path / "deep.png")
    small = thumbnail(tmp_path / "deep.png").removeprefix("data:image/png;base64,")
    assert Image.open(io.BytesIO(b64decode(small))).convert("RGB").getpixel((3, 3)) == (156, 156, 156)


def test_conversions_are_those_of_little_cms(tmp_path: Path, shared_p3: bytes) -> None:
    """Relative colorimetric with black point compensation, through Pillow's other call."""
    Image.fromarray(colours()).save(tmp_path / "a.png", icc_profile=shared_p3)
    expected = ImageCms.profileToProfile(
        Image.fromarray(colours()),
        ImageCms.getOpenProfile(io.BytesIO(shared_p3)),
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(expected))


@pytest.mark.parametrize("suffix", [".png", ".avif", ".heic"])
def test_code_points_are_heeded(tmp_path: Path, suffix: str) -> None:
    """Display P3 as 12 and 13 of H.273 say it, beside numbers that say sRGB."""
    path = tmp_path / f"a{suffix}"
    numbers = (200, 90, 30)
    if suffix == ".png":
        gamma = (b"gAMA", struct.pack(">I", 100000))  # cICP wins over all others
        path.write_bytes(png(8, 2, bytes(numbers), 1, (b"cICP", bytes((12, 13, 0, 1))), gamma))
    else:
        image = Image.new("RGB", (32, 32), numbers)
        image.save(path, quality=100) if suffix == ".avif" else path.write_bytes(b64decode(HEIC))
        numbers = tuple(pixels(path)[0, 0])
        content = path.read_bytes()
        at = content.index(b"nclx") + 4
        path.write_bytes(content[:at] + struct.pack(">HH", 12, 13) + content[at + 4 :])
    expected = in_srgb(decoded(np.array(numbers) / 255), P3)
    assert np.abs(pixels(path)[0, 0] - expected).max() <= 1
    assert np.abs(expected - numbers).max() > 5


def test_a_profile_wins_over_code_points_but_in_png(tmp_path: Path, shared_p3: bytes) -> None:
    Image.new("RGB", (32, 32), (200, 90, 30)).save(tmp_path / "a.avif", quality=100, icc_profile=shared_p3)
    assert np.abs(pixels(tmp_path / "a.avif")[0, 0] - in_srgb(decoded(np.array([200, 90, 30]) / 255), P3)).max() <= 3
    said = (b"cICP", bytes((1, 13, 0, 1)))
    profile = (b"iCCP", b"p3\0\0" + zlib.compress(shared_p3))
    (tmp_path / "a.png").write_bytes(png(8, 2, bytes((200, 90, 30)), 1, said, profile))
    assert tuple(pixels(tmp_path / "a.png")[0, 0]) == (200, 90, 30)


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused_by_its_name(tmp_path: Path, transfer: int, name: str) -> None:
    (tmp_path / "a.png").write_bytes(png(8, 2, bytes(3), 1, (b"cICP", bytes((9, transfer, 0, 1)))))
    with pytest.raises(DataError, match=rf"a\.png is in HDR \({name}\)"):
        open_image(tmp_path / "a.png")


def test_code_points_that_are_not_known_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(8, 2, bytes((9, 8, 7)), 1, (b"cICP", bytes((10, 17, 0, 1)))))
    picture = read_picture(tmp_path / "a.png")
    assert picture.image.getpixel((0, 0)) == (9, 8, 7) and "(H.273 10, 17), taken as sRGB" in picture.notes[0]


def tiff(array: np.ndarray, kind: int, *, planes: bool = False, sample: int = 1, turn: int = 1) -> bytes:
    """A TIFF written by hand: height, width and, in planes or not, samples."""
    height, width, samples = array.shape
    parts = [array[..., i].tobytes() for i in range(samples)] if planes else [array.tobytes()]
    at = [8 + sum(map(len, parts[:i])) for i in range(len(parts))]
    data, rows = b"".join(parts), []
    tags = {256: [width], 257: [height], 258: [array.itemsize * 8] * samples, 259: [1], 262: [kind], 273: at}
    tags |= {274: [turn], 277: [samples], 278: [height], 279: list(map(len, parts)), 284: [1 + planes]}
    for tag, values in (tags | {339: [sample] * samples}).items():
        written = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            written, data = struct.pack("<I", 8 + len(data)), data + written
        rows.append(struct.pack("<HHI", tag, 4, len(values)) + written)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(rows)) + b"".join(rows) + bytes(4)


TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("turn", TURNED)
@pytest.mark.parametrize(("bits", "samples"), [(8, 1), (16, 1), (8, 3)])
def test_a_tiff_that_says_how_it_lies_is_turned_so(tmp_path: Path, turn: int, bits: int, samples: int) -> None:
    values = np.arange(6 * 4 * samples).reshape(6, 4, samples) * 3
    written = (values * (257 if bits == 16 else 1)).astype(f"<u{bits // 8}")
    (tmp_path / "a.tif").write_bytes(tiff(written, 1 if samples == 1 else 2, turn=turn))
    expected = TURNED[turn](np.broadcast_to(values, (6, 4, 3)))
    assert np.array_equal(pixels(tmp_path / "a.tif"), expected)


def test_samples_that_would_be_taken_for_others_are_refused(tmp_path: Path) -> None:
    values = np.arange(16 * 16 * 3, dtype="<u2").reshape(16, 16, 3)
    (tmp_path / "planes.tif").write_bytes(tiff(values, 2, planes=True))
    (tmp_path / "signed.tif").write_bytes(tiff(values[..., :1].astype(np.int8), 1, sample=2))
    for name, said in (("planes", "16 bits a sample in a plane for each colour"), ("signed", "signed whole numbers")):
        with pytest.raises(DataError, match=rf"{name}\.tif has {said}"):
            open_image(tmp_path / f"{name}.tif")
    (tmp_path / "eight.tif").write_bytes(tiff(values.astype(np.uint8), 2, planes=True))
    assert np.array_equal(pixels(tmp_path / "eight.tif"), values.astype(np.uint8))


def test_round_a_gifs_first_frame_nothing_is_seen(tmp_path: Path) -> None:
    Image.new("P", (16, 16), 1).save(tmp_path / "a.gif")
    content = bytearray((tmp_path / "a.gif").read_bytes())
    content[6:10] = struct.pack("<HH", 20, 20)  # a screen that is larger than the frame
    at = content.index(b",\0\0\0\0")
    content[at + 1 : at + 5] = struct.pack("<HH", 2, 3)
    (tmp_path / "a.gif").write_bytes(content)
    expected = np.full((20, 20, 3), 255)
    expected[3:19, 2:18] = pixels(tmp_path / "a.gif")[5, 5]
    assert np.array_equal(pixels(tmp_path / "a.gif"), expected) and (expected[5, 5] != 255).all()


def test_a_picture_that_is_transparent_all_over_is_said(tmp_path: Path) -> None:
    Image.new("RGBA", (16, 16), (9, 9, 9, 0)).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").notes == ("transparent all over, so white",)

"""Folders of pictures: what is read, what is refused, and what the message says."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.training_utils import find_nearest_bucket
from PIL import Image

from dora_diffusion.data.buckets import bucket_sizes, nearest_bucket
from dora_diffusion.data.cache import encode_images, tag_orders
from dora_diffusion.data.folder import alike_in, first_caption, read_folder
from dora_diffusion.data.pictures import open_image
from dora_diffusion.errors import DataError, PromptError
from dora_diffusion.models.loading import Base


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 10, 10)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_captions_come_from_sidecars_then_metadata_then_the_instance_prompt(folder: Path) -> None:
    (folder / "0.txt").write_text("from the sidecar\n")
    lines = [{"file_name": "0.png", "text": "not used"}, {"file_name": "1.png", "text": "from metadata"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    captions = [image.caption for image in read_folder(folder, "the instance prompt").images]
    assert captions == ["from the sidecar", "from metadata", "the instance prompt"]
    assert first_caption(folder) == "from the sidecar"
    (folder / "0.txt").unlink()
    assert first_caption(folder) == "not used"
    (folder / "metadata.jsonl").unlink()
    assert first_caption(folder, "the instance prompt") == "the instance prompt"


# 64 x 48, green on the left and red on the right, and EXIF that says it was taken on its side; by pillow-heif 1.8.1.
HEIC = """
    AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAchtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAADRpbG9jAAAA
    AERAAAIAAQAAAAAB7AABAAAAAAAAACMAAgAAAAACDwABAAAAAAAAACQAAAA4aWluZgAAAAAAAgAAABVpbmZlAgAAAAABAABodmMxAAAAABVpbmZl
    AgAAAQACAABFeGlmAAAAAA5waXRtAAAAAAABAAABB2lwcnAAAADmaXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH/
    /wNwAAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29s
    cm5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xhcAAAAEAAAAABAAAAMAAAAAEAAAAAAAAAAv////AAAAACAAAAEHBpeGkAAAAA
    AwgICAAAAAlpcm90AwAAABlpcG1hAAAAAAAAAAEAAQaBAgMFhIYAAAAaaXJlZgAAAAAAAAAOY2RzYwACAAEAAQAAAE9tZGF0AAAAHygBrxmA70ml
    v//AS3/imb/ULIX/+VDnSEefWcg21vAAAAAGRXhpZgAATU0AKgAAAAgAAQESAAMAAAABAAYAAAAAAAA=
"""


def test_a_telephones_photograph_is_read_upright(tmp_path: Path) -> None:
    (tmp_path / "IMG_0001.HEIC").write_bytes(b64decode(HEIC))
    [image] = read_folder(tmp_path, "a dog").images
    picture = open_image(image.path)
    assert picture.size == (48, 64)
    top, bottom = picture.getpixel((24, 4)), picture.getpixel((24, 60))
    assert np.abs(np.subtract(top, (20, 160, 40))).max() < 10 and np.abs(np.subtract(bottom, (200, 30, 30))).max() < 10


def test_without_the_package_a_telephones_photograph_says_which_one(tmp_path: Path) -> None:
    (tmp_path / "IMG_0001.HEIC").write_bytes(b64decode(HEIC))
    blocked = "import sys; sys.modules |= dict.fromkeys(('pi_heif', 'pillow_heif')); import importlib.util as u; "
    blocked += "find = u.find_spec; u.find_spec = lambda name, *a: None if 'heif' in name else find(name, *a); "
    script = blocked + f"from dora_diffusion.data.folder import read_folder; read_folder({str(tmp_path)!r}, 'a dog')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "IMG_0001.HEIC: is a HEIC photograph" in done.stderr and "'dora-diffusion[heic]'" in done.stderr


def test_a_byte_order_mark_is_no_part_of_a_caption(folder: Path) -> None:
    (folder / "0.txt").write_bytes("\ufeffcafé".encode())
    assert read_folder(folder, "x").images[0].caption == "café"


def test_files_that_are_no_pictures_are_named_not_dropped_silently(folder: Path) -> None:
    (folder / "notes.md").write_text("notes")
    (folder / "more").mkdir()
    assert read_folder(folder, "x").ignored == ("more/", "notes.md")


def test_transparency_becomes_white_and_exif_rotation_is_applied(tmp_path: Path) -> None:
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((3, 3)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    Image.new("RGB", (40, 20), "blue").save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (20, 40)


@pytest.mark.parametrize(
    ("resolution", "multiple", "largest"),
    [(512, 8, None), (1024, 16, None), (768, 8, None), (64, 8, 64), (64, 4, None)],
)
def test_buckets_keep_to_the_squares_pixels_and_the_bases_multiple(
    resolution: int, multiple: int, largest: int | None
) -> None:
    buckets = bucket_sizes(resolution, multiple, largest)
    assert (resolution, resolution) in buckets and len(buckets) >= 7
    for width, height in buckets:
        assert width % multiple == height % multiple == 0
        assert 0.5 * resolution**2 <= width * height <= resolution**2
        assert max(width, height) <= 2.5 * min(width, height) and (height, width) in buckets
        assert max(width, height) <= (largest or 4 * resolution)


@pytest.mark.parametrize(
    "size", [(4032, 3024), (3024, 4032), (1920, 1080), (600, 600), (1000, 980), (3000, 2000), (9, 90)]
)
def test_the_nearest_bucket_is_diffusers_own(size: tuple[int, int]) -> None:
    buckets = bucket_sizes(1024, 16)
    width, height = size
    found = buckets[find_nearest_bucket(height, width, [(h, w) for w, h in buckets])]
    assert nearest_bucket(size, buckets) == found


def test_pictures_are_encoded_in_their_own_shape_and_cropped_only_to_the_bucket(tmp_path: Path, sd_base: Base) -> None:
    """Red above, green in the middle, blue below: a high picture keeps all three, a square crop has green alone."""
    for name, size in (("high", (20, 60)), ("wide", (60, 20)), ("square", (40, 40))):
        picture = Image.new("RGB", size, (0, 255, 0))
        picture.paste((255, 0, 0), (0, 0, size[0], size[1] // 3))
        picture.paste((0, 0, 255), (0, size[1] - size[1] // 3, *size))
        picture.save(tmp_path / f"{name}.png")
    images = read_folder(tmp_path, "disc").images
    groups = encode_images(sd_base, images, [(16, 16), (16, 48)])
    assert [(group.views, len(group), group.shape) for group in groups] == [(1, 2, (4, 8, 8)), (1, 1, (4, 24, 8))]
    vae, high = (
        sd_base.pipe.vae,
        np.asarray(Image.open(tmp_path / "high.png").resize((16, 48), Image.Resampling.LANCZOS)),
    )
    middle = np.asarray(
        Image.open(tmp_path / "wide.png").crop((20, 0, 40, 20)).resize((16, 16), Image.Resampling.LANCZOS)
    )
    for group, place, pixels in ((groups[1], 0, high), (groups[0], 1, middle)):
        x = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            expected = vae.encode(x).latent_dist.mean * vae.config.scaling_factor
        torch.testing.assert_close(group.mean(torch.tensor([place]))[0], expected[0], atol=1e-5, rtol=1e-5)


def _claims(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its few bytes do not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_every_bad_picture_is_listed_with_its_reason(folder: Path) -> None:
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "noise.jpg").write_bytes(b"this is no picture at all")
    (folder / "empty.webp").write_bytes(b"")
    (folder / "bomb.png").write_bytes(_claims(60_000, 60_000))
    (folder / "big.png").write_bytes(_claims(11_000, 10_000))
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    with pytest.raises(DataError) as error:
        read_folder(folder, "x")
    message = str(error.value)
    assert message.startswith("6 of 9 pictures")
    for expected in ("cut.png: is damaged", "noise.jpg: is no picture", "empty.webp: is no picture", "dot.png: 1 x 1"):
        assert expected in message
    assert "bomb.png: claims more than" in message and "big.png: 11000 x 10000 is more than" in message
    assert "move them out of the folder" in message


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: folder / "missing", "no folder at"),
        (lambda folder: folder / "0.png", "is a file; images must be a folder"),
        (lambda folder: _mkdir(folder / "new"), "has no pictures"),
        (lambda folder: folder / ("x" * 999), "it is too long a name"),
        (lambda folder: _within(folder, "10_sks dog"), r"its subfolders have \(10_sks dog\): give one of these"),
    ],
)
def test_a_folder_that_is_missing_a_file_or_empty_is_said_so(folder: Path, make, expected: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=expected):
        read_folder(make(folder), "x")


def _within(folder: Path, name: str) -> Path:
    """The folder's pictures in a subfolder, as sd-scripts wants them."""
    (folder / "above" / name).mkdir(parents=True)
    (folder / "0.png").rename(folder / "above" / name / "0.png")
    return folder / "above"


def _mkdir(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("0.txt", "caf\xe9".encode("latin-1"), "not UTF-8 text"),
        ("0.txt", b"  \n", "is empty"),
        ("metadata.jsonl", b"{not json}", "line 1"),
        ("metadata.jsonl", b'{"file_name": "9.png", "text": "x"}', "no picture '9.png'"),
        ("metadata.jsonl", b'{"file": "0.png"}', "no file_name"),
    ],
)
def test_a_bad_caption_file_is_named(folder: Path, name: str, content: bytes, expected: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=expected) as error:
        read_folder(folder, "x")
    assert name in str(error.value)


def test_pictures_without_a_caption_ask_for_an_instance_prompt(folder: Path) -> None:
    with pytest.raises(DataError, match="--instance-prompt"):
        read_folder(folder)


def test_long_captions_are_named_together_or_read_as_far_as_stock_diffusers_reads_them(
    sd_base: Base, tmp_path: Path
) -> None:
    long = "red apple on a green table " * 40
    for i in range(8):
        Image.new("RGB", (24, 24), "red").save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("disc" if i == 0 else f"{i} {long}")
    images = read_folder(tmp_path).images
    with pytest.raises(PromptError) as refused:
        encode_images(sd_base, images, [(16, 16)])
    said = str(refused.value)
    assert said.startswith("7 of 8 captions are too long") and "1.png: the prompt is" in said and "and 2 more" in said
    assert "set cut_captions to true" in said and "0.png" not in said

    (encoded,) = encode_images(sd_base, images, [(16, 16)], cut_captions=True)
    stock, _ = sd_base.pipe.encode_prompt(images[3].caption, sd_base.device, 1, False)
    row = int(encoded.caption_of[0, 3])
    assert encoded.captions[row] == images[3].caption
    assert torch.equal(encoded.conditioning[[row]].tensors["encoder_hidden_states"], stock)


def test_tags_are_shuffled_behind_the_first_and_each_order_is_encoded(sd_base: Base, tmp_path: Path) -> None:
    captions = ("disc, red, on white, round", "ring, green")
    for i, caption in enumerate(captions):
        Image.new("RGB", (24, 24), "red").save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(caption)
    images = read_folder(tmp_path).images
    (plain,) = encode_images(sd_base, images, [(16, 16)])
    (shuffled,) = encode_images(sd_base, images, [(16, 16)], shuffle_tags_after=1)
    assert plain.caption_of.shape == (1, 2) and shuffled.caption_of.shape == (8, 2) and len(shuffled) == 2
    orders = {shuffled.captions[row] for row in shuffled.caption_of[:, 0]}
    assert shuffled.captions[int(shuffled.caption_of[0, 0])] == captions[0] and len(orders) > 2
    assert all(each.startswith("disc, ") for each in orders)
    assert {frozenset(each.split(", ")) for each in orders} == {frozenset(captions[0].split(", "))}
    assert {shuffled.captions[row] for row in shuffled.caption_of[:, 1]} == {captions[1]}  # one tag has no other order

    order, index = torch.tensor([2, 0]), torch.tensor([0, 1])
    rows = shuffled.caption_rows(index, order=order)
    for row, (picture, which) in zip(rows, zip(index, order)):
        stock, _ = sd_base.pipe.encode_prompt(tag_orders(captions[picture], 1)[which], sd_base.device, 1, False)
        assert torch.equal(shuffled.conditioning[[int(row)]].tensors["encoder_hidden_states"], stock)


def test_pictures_that_are_measured_on_and_trained_on_are_said(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "red"), ("c", "blue")):
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{name}.png")
    images = read_folder(tmp_path, "x").images
    twice, seen = alike_in(images, images)
    assert twice.endswith("each of which is trained on: b.png (as a.png)")
    assert seen.startswith("held-out pictures that are trained on too")
    assert seen.endswith(": a.png (as a.png), b.png (as a.png), c.png (as c.png)")
    assert alike_in(images[1:2], images[2:]) == ()


def test_pictures_of_which_most_is_cropped_are_known(tmp_path: Path, sd_base: Base) -> None:
    for name, size in (("wide", (640, 64)), ("high", (64, 640)), ("fits", (128, 64))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    images = read_folder(tmp_path, "x").images
    buckets = bucket_sizes(64, sd_base.multiple)
    names = [name for group in encode_images(sd_base, images, buckets) for name in group.cropped]
    assert sorted(names) == ["high.png", "wide.png"]

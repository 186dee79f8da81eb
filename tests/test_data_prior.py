"""Pictures of the superclass: drawn once, the same after an interruption, or a person's own with their captions."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perfusion.data.images import ConceptImageError
from perfusion.data.prior import PriorImages, drawn_images, real_images

MADE_OF = {"model": "a", "steps": 5}


class Painter:
    """Draws pictures that depend on prompt and seed, and on the place in a batch as kernels do; may be stopped."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seeds: list[int] = []
        self.stop_after = stop_after

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Image.Image]:
        for k, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            if k == self.stop_after:
                raise KeyboardInterrupt
            self.seeds.append(seed)
            values = np.random.default_rng([seed, len(prompt), k % 4]).integers(0, 255, (8, 8, 3))
            yield Image.fromarray(values.astype(np.uint8))


def drawn(cache: Path, painter: Painter, count: int = 6, **changes) -> PriorImages:
    values = {"made_of": MADE_OF, "prompt": "a photo of a cat", "seed": 0, "batch_size": 4, **changes}
    return drawn_images(cache, count=count, draw=painter, **values)


def contents(images: PriorImages) -> list[bytes]:
    return [path.read_bytes() for path in images.paths]


def test_pictures_are_drawn_once(tmp_path: Path) -> None:
    painter = Painter()
    images = drawn(tmp_path, painter)
    assert len(images) == 6 and set(images.prompts) == {"a photo of a cat"}
    assert len({*painter.seeds}) == 8 and len({*contents(images)}) == 6, "whole batches, a seed for each picture"
    again = Painter()
    assert drawn(tmp_path, again) == images and not again.seeds
    more = drawn(tmp_path, again, count=9)
    assert more.paths[:6] == images.paths and len(again.seeds) == 4, "the count is no part of the key"
    assert drawn(tmp_path, again, count=2).paths == images.paths[:2]
    inputs = json.loads((images.paths[0].parent / "inputs.json").read_text())
    assert inputs == {"format": 1, "prompt": "a photo of a cat", "seed": 0, "batch_size": 4, **MADE_OF}


@pytest.mark.parametrize("stop_after", [1, 5])
def test_an_interrupted_drawing_goes_on_to_the_same_pictures(tmp_path: Path, stop_after: int) -> None:
    whole = drawn(tmp_path / "whole", Painter())
    with pytest.raises(KeyboardInterrupt):
        drawn(tmp_path / "stopped", Painter(stop_after))
    (folder,) = (tmp_path / "stopped").iterdir()
    assert len(list(folder.glob("*.png"))) == stop_after and not list(folder.glob(".*"))
    painter = Painter()
    assert contents(drawn(tmp_path / "stopped", painter)) == contents(whole)
    assert len(painter.seeds) == (8 if stop_after == 1 else 4), "only batches in which a picture is missing"


@pytest.mark.parametrize(
    "change",
    [{"prompt": "a cat"}, {"seed": 1}, {"batch_size": 2}, {"made_of": {**MADE_OF, "steps": 6}}, {"made_of": {}}],
)
def test_other_inputs_are_other_pictures(tmp_path: Path, change: dict) -> None:
    first, second = drawn(tmp_path, Painter()), drawn(tmp_path, Painter(), **change)
    assert first.paths[0].parent != second.paths[0].parent


def test_pixels_are_read_in_parts(tmp_path: Path) -> None:
    images = drawn(tmp_path, Painter())
    pixels = images.pixels(2, 5, 8)
    assert pixels.shape == (3, 3, 8, 8) and pixels.dtype == torch.float32
    with Image.open(images.paths[3]) as image:
        expected = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
    torch.testing.assert_close(pixels[1], expected)


def test_real_pictures_have_captions_beside_them(tmp_path: Path) -> None:
    for name in ("10.png", "2.jpg", "1.png"):
        Image.new("RGB", (20, 30), "red").save(tmp_path / name)
    (tmp_path / "2.txt").write_text("a tabby\n asleep ")
    images = real_images(str(tmp_path), 5, "a photo of a cat")
    assert [path.name for path in images.paths] == ["1.png", "2.jpg", "10.png"]
    assert images.prompts == ("a photo of a cat", "a tabby asleep", "a photo of a cat")
    assert len(real_images(str(tmp_path), 2, "a cat")) == 2
    assert images.pixels(0, 3, 16).shape == (3, 3, 16, 16)


def test_what_is_wrong_with_real_pictures_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConceptImageError, match=r"concept\.prior='.*': no such file"):
        real_images(str(tmp_path / "none"), 5, "a cat")
    Image.new("RGB", (200, 300), "red").save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConceptImageError, match=r"a\.jpg.*truncated"):
        real_images(str(tmp_path), 5, "a cat")
    Image.new("RGB", (20, 30), "red").save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConceptImageError, match=r"concept\.prior: .*a\.txt"):
        real_images(str(tmp_path), 5, "a cat")

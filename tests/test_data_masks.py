"""Masks find their image, keep their softness, and stay on the object through crop and downsampling."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perfusion.data.images import ConceptImageError, fit
from perfusion.data.masks import check_aspect, find_masks, mask_to_latent, normalise_mask, read_mask

pytestmark = pytest.mark.usefixtures("here")


def _files(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (6, 6), "white").save(folder / name)
    return [folder / name for name in names]


class TestFindMasks:
    def test_paired_by_name_in_the_order_of_the_images(self, tmp_path):
        images = _files(tmp_path, "10.jpg", "2.webp", "cat.front.png")
        _files(tmp_path / "mask", "2.png", "10.png", "cat.front.jpg")
        expected = [tmp_path / "mask" / name for name in ("10.png", "2.png", "cat.front.jpg")]
        assert find_masks("mask", images) == expected
        assert find_masks(["mask/2.png", "mask/[!2]*"], images) == expected

    @pytest.mark.parametrize(
        ("images", "masks", "says"),
        [
            (["1.jpg"], ["1.png", "2.png"], r"mask without image: .*mask/2.png.*'2'; the images are 1.jpg"),
            (["1.jpg", "2.jpg"], ["1.png"], r"image without mask: .*/2.jpg.*named 2.png.*masks are 1.png"),
            (["1.jpg"], ["1.png", "1.jpg"], r"two masks of one name: .*1.jpg and .*1.png"),
            (["1.jpg", "1.png"], ["1.png"], r"two images of one name: .*1.jpg and .*1.png"),
        ],
    )
    def test_what_cannot_be_paired(self, tmp_path, images, masks, says):
        _files(tmp_path / "mask", *masks)
        with pytest.raises(ConceptImageError, match=says):
            find_masks("mask", _files(tmp_path, *images))

    def test_an_image_is_not_its_own_mask(self, tmp_path):
        images = _files(tmp_path, "1.jpg")
        with pytest.raises(ConceptImageError, match="as its own mask"):
            find_masks(str(tmp_path), images)


def _mask(folder: Path, values: np.ndarray, name: str = "m.png") -> np.ndarray:
    Image.fromarray(values).save(folder / name)
    mask = read_mask(folder / name)
    assert mask.dtype == np.float32 and mask.shape == values.shape[:2]
    return mask


class TestReadMask:
    ramp = np.arange(0, 256, 5, dtype=np.uint8)[None].repeat(3, 0)

    def test_soft_grey(self, tmp_path):
        assert np.allclose(_mask(tmp_path, self.ramp), self.ramp / 255, atol=1e-6)

    def test_sixteen_bits_keep_their_precision(self, tmp_path):
        values = np.arange(0, 65536, 771, dtype=np.uint16)[None] + np.uint16(0)
        assert np.allclose(_mask(tmp_path, values), values / 65535, atol=1e-7)

    def test_one_bit_palette_and_jpeg(self, tmp_path):
        Image.new("1", (4, 4), 1).save(tmp_path / "a.png")
        assert (read_mask(tmp_path / "a.png") == 1).all()
        palette = Image.new("P", (4, 4), 1)
        palette.putpalette([0, 0, 0, 255, 255, 255])
        palette.save(tmp_path / "b.png")
        assert (read_mask(tmp_path / "b.png") == 1).all()
        Image.new("CMYK", (4, 4), 0).save(tmp_path / "c.jpg")
        assert np.allclose(read_mask(tmp_path / "c.jpg"), 1, atol=0.02)

    @pytest.mark.parametrize("colour", [0, 255, 90])
    def test_alpha_alone(self, tmp_path, colour):
        rgba = np.full((*self.ramp.shape, 4), colour, np.uint8)
        rgba[..., 3] = self.ramp
        assert np.allclose(_mask(tmp_path, rgba), self.ramp / 255, atol=1e-6)
        rgba[self.ramp == 0, :3] = 13  # what lies under full transparency does not count
        assert np.allclose(_mask(tmp_path, rgba), self.ramp / 255, atol=1e-6)
        assert np.allclose(_mask(tmp_path, rgba[..., 2:]), self.ramp / 255, atol=1e-6)  # LA

    def test_a_cut_out_object_is_its_opacity(self, tmp_path):
        rgba = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
        rgba[..., 3] = 0
        rgba[2:6, 2:6, 3] = 255
        assert np.array_equal(_mask(tmp_path, rgba), rgba[..., 3] / 255)

    def test_opaque_alpha_says_nothing(self, tmp_path):
        rgba = np.stack([self.ramp, self.ramp, self.ramp, np.full_like(self.ramp, 255)], -1)
        assert np.allclose(_mask(tmp_path, rgba), self.ramp / 255, atol=1e-6)

    def test_transparent_parts_of_a_grey_mask_are_not_the_object(self, tmp_path):
        rgba = np.stack([self.ramp] * 4, -1)
        assert np.allclose(_mask(tmp_path, rgba), (self.ramp / 255.0) ** 2, atol=1e-6)

    def test_orientation_is_that_of_the_image(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(self.ramp).save(tmp_path / "m.png", exif=exif)
        assert np.allclose(read_mask(tmp_path / "m.png"), np.rot90(self.ramp, -1) / 255, atol=1e-6)

    @pytest.mark.parametrize("mode, colour", [("L", 0), ("1", 0), ("RGB", 0), ("RGBA", (0, 0, 0, 255)),
                                              ("RGBA", (255, 255, 255, 0)), ("I;16", 0)])  # fmt: skip
    def test_all_zero(self, tmp_path, mode, colour):
        Image.new(mode, (7, 5), colour).save(tmp_path / "m.png")
        with pytest.raises(ConceptImageError, match=r"m\.png: the mask is zero everywhere \(7x5 pixels\)"):
            read_mask(tmp_path / "m.png")


class TestCheckAspect:
    def _check(self, mask_size, image_size):
        mask = np.ones((mask_size[1], mask_size[0]), np.float32)
        check_aspect(mask, Path("mask/1.png"), Image.new("RGB", image_size), Path("1.jpg"))

    def test_any_size_of_the_same_shape(self):
        for size in ((352, 352), (350, 355), (9, 9), (3000, 3000)):
            self._check(size, (2048, 2048))
        self._check((16, 11), (3000, 2000))  # a pixel is what rounding costs

    @pytest.mark.parametrize("size", [(352, 364), (352, 340), (640, 480)])
    def test_another_shape(self, size):
        found = rf"1\.png: the mask is {size[0]}x{size[1]}, its image 1\.jpg is 2048x2048"
        with pytest.raises(ConceptImageError, match=found):
            self._check(size, (2048, 2048))

    def test_a_mask_on_its_side_is_recognised(self):
        with pytest.raises(ConceptImageError, match="lies on its side"):
            self._check((480, 640), (4000, 3000))


def _scene(width: int, height: int, box: tuple[int, int, int, int], scale: int = 1) -> tuple[Image.Image, np.ndarray]:
    """A blue picture with a red object in `box` (left, top, right, bottom), and its mask `scale` times smaller."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 2] = 255
    pixels[box[1] : box[3], box[0] : box[2]] = (255, 0, 0)
    mask = np.zeros((height // scale, width // scale), np.float32)
    mask[box[1] // scale : box[3] // scale, box[0] // scale : box[2] // scale] = 1
    return Image.fromarray(pixels), mask


class TestFit:
    @pytest.mark.parametrize("size", [(64, 64), (640, 480), (30, 90), (16, 16), (5000, 3)])
    def test_shapes_and_ranges(self, size):
        noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        soft = np.random.default_rng(1).random((size[1], size[0]), dtype=np.float32)
        pixels, mask = fit(Image.fromarray(noise), soft, 32)
        assert mask is not None
        assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32 and pixels.is_contiguous()
        assert mask.shape == (32, 32) and mask.dtype == torch.float32
        assert -1 <= pixels.min() < pixels.max() <= 1 and 0 <= mask.min() < mask.max() <= 1

    def test_values_at_the_same_size(self):
        noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        pixels, mask = fit(Image.fromarray(noise), None, 16)
        assert mask is None
        assert torch.equal(pixels, torch.from_numpy(noise).permute(2, 0, 1) / 127.5 - 1)

    def test_downscaling_is_antialiased(self):
        stripes = np.zeros((512, 512, 3), np.uint8)
        stripes[:, ::2] = 255
        pixels, _ = fit(Image.fromarray(stripes), None, 32)
        assert pixels[:, 2:-2, 2:-2].abs().max() < 0.02  # grey, no moiré

    def test_without_a_mask_the_crop_is_central(self):
        image, _ = _scene(96, 32, (32, 0, 64, 32))
        assert torch.allclose(fit(image, None, 32)[0], torch.tensor([1.0, -1, -1])[:, None, None].expand(3, 32, 32))

    @pytest.mark.parametrize("turned", [False, True])
    @pytest.mark.parametrize("left", [0, 8, 40, 52, 120, 168])
    @pytest.mark.parametrize("scale", [1, 4])
    def test_object_is_kept_and_lies_under_its_mask(self, turned, left, scale):
        image, mask = _scene(192, 64, (left, 16, left + 24, 40), scale)
        if turned:
            image, mask = image.transpose(Image.Transpose.TRANSPOSE), np.ascontiguousarray(mask.T)
        pixels, soft = fit(image, mask, 64)
        assert soft is not None
        assert soft.sum() == pytest.approx(24 * 24, rel=0.001 if scale == 1 else 0.03)  # whole, blurred if enlarged
        red = pixels[0] > 0
        assert red.sum() == 24 * 24
        assert (soft[red] > 0.38).all() and soft[~red].sum() < 0.13 * soft.sum()

    def test_the_crop_moves_no_further_than_needed(self):
        at_centre, _ = fit(*_scene(192, 64, (70, 16, 94, 40)), 64)
        image, _ = _scene(192, 64, (70, 16, 94, 40))
        assert torch.equal(at_centre, fit(image, None, 64)[0])
        touching, mask = fit(*_scene(192, 64, (140, 16, 164, 40)), 64)
        assert mask is not None and mask[:, -1].max() > 0.9 and (touching[0, 20] > 0).sum() == 24

    def test_an_object_that_is_too_long_keeps_most_of_its_weight(self):
        image, mask = _scene(192, 64, (0, 0, 192, 64))
        mask[:, :60] *= 0.2
        _, soft = fit(image, mask, 64)
        assert soft is not None and soft.min() > 0.99

    def test_faint_noise_does_not_move_the_crop(self):
        image, mask = _scene(192, 64, (80, 16, 104, 40))
        noisy = mask.copy()
        noisy[:, 44:60] = 0.03  # a crop that holds both exists
        assert torch.equal(fit(image, mask, 64)[0], fit(image, noisy, 64)[0])

    def test_one_pixel_of_a_long_mask_survives(self):
        mask = np.zeros((8, 4000), np.float32)
        mask[3, 3999] = 1 / 255
        _, soft = fit(Image.new("RGB", (4000, 8)), mask, 4)
        assert soft is not None and soft.max() > 0


class TestLatentMask:
    def test_divided_by_its_own_maximum(self):
        masks = torch.stack([torch.full((1, 4, 4), 0.25), torch.eye(4)[None] * 0.5])
        masks[0, 0, 0, 0] = 0
        normal = normalise_mask(masks)
        assert normal.amax(dim=(1, 2, 3)).tolist() == [1, 1]
        assert torch.equal(normal[1, 0], torch.eye(4)) and normal[0, 0, 0, 0] == 0
        assert torch.equal(normalise_mask(masks[1, 0]), torch.eye(4))

    def test_area_mean_then_maximum_per_sample(self):
        masks = torch.zeros(2, 1, 8, 8)
        masks[0, 0, :4, :2] = 1  # one block of 4 x 4, half of it
        masks[0, 0, 4:, 4:] = 0.25
        masks[1, 0, 0, 0] = 0.01
        latent = mask_to_latent(masks, 2)
        assert latent.shape == (2, 1, 2, 2)
        assert torch.allclose(latent[0, 0], torch.tensor([[1.0, 0], [0, 0.5]]))
        assert torch.allclose(latent[1, 0], torch.tensor([[1.0, 0], [0, 0]]))

    def test_a_size_that_does_not_divide(self):
        latent = mask_to_latent(torch.rand(3, 1, 50, 50, generator=torch.Generator().manual_seed(0)), 8)
        assert latent.shape == (3, 1, 8, 8) and latent.amax(dim=(1, 2, 3)).tolist() == [1, 1, 1]

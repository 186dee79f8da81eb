"""Every draw of a training is a function of its place alone, pictures are drawn evenly, and files become tensors."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perfusion.config import ConceptConfig
from perfusion.data.dataset import StepDataset, seed_of
from perfusion.data.images import ConceptImageError, Examples
from perfusion.training.module import examples_of

PROMPTS = ["a photo of a <cat*>", "a good photo of a <cat*>", "a picture of the <cat*>"]


def _dataset(**changes) -> StepDataset:
    settings = {
        "n_images": 5, "prompts": PROMPTS, "latent_shape": (4, 8, 8), "steps": 60, "batch_size": 4, "seed": 3,
        "num_train_timesteps": 1000,
    }  # fmt: skip
    return StepDataset(**(settings | changes))


def _equal(one, two) -> bool:
    plain = ("index", "prompt", "timestep")
    return all(one[key] == two[key] for key in plain) and torch.equal(one["noise"], two["noise"])


class TestSeedOf:
    def test_golden(self):
        assert seed_of(0) == 6197007067532723406
        assert seed_of("step", 0, 1, 2) == 362406812572100047

    def test_range_order_and_kind_of_parts(self):
        parts = [(), (1,), ("1",), (1.0,), (1, 2), (2, 1), (12,), ("1", "2"), ("1, 2",), ("a", "bc"), ("ab", "c")]
        seeds = [seed_of(*p) for p in parts] + [seed_of(k) for k in range(100, 1100)]
        assert len(set(seeds)) == len(seeds)
        assert all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**62


class TestStepDataset:
    def test_item_has_its_kinds(self):
        data = _dataset()
        assert len(data) == 240
        item = data[7]
        assert set(item) == {"index", "prompt", "timestep", "noise", "mirrored"} and item["mirrored"] is False
        assert type(item["index"]) is int and type(item["timestep"]) is int
        assert item["noise"].shape == (4, 8, 8) and item["noise"].dtype == torch.float32

    def test_item_is_a_function_of_seed_and_place(self):
        data = _dataset()
        in_order = [data[k] for k in range(40)]
        torch.manual_seed(99)
        again = _dataset()
        longer = _dataset(steps=500)
        for k in reversed(range(40)):
            torch.rand(3)
            assert _equal(again[k], in_order[k]) and _equal(longer[k], in_order[k])

    def test_seeds_steps_and_slots_differ(self):
        data, other = _dataset(), _dataset(seed=4)
        noises = [data[k]["noise"] for k in range(12)] + [other[k]["noise"] for k in range(12)]
        assert len({float(n[0, 0, 0]) for n in noises}) == 24
        assert [data[k]["index"] for k in range(60)] != [other[k]["index"] for k in range(60)]

    @pytest.mark.parametrize("n", [1, 3, 5, 7])
    def test_each_block_uses_each_image_once(self, n):
        data = _dataset(n_images=n)
        drawn = [data[k]["index"] for k in range(len(data) // n * n)]
        blocks = [tuple(drawn[i : i + n]) for i in range(0, len(drawn), n)]
        assert all(sorted(block) == list(range(n)) for block in blocks)
        assert n == 1 or any(a != b for a, b in pairwise(blocks))

    def test_draws_are_uniform_and_normal(self):
        data = _dataset(steps=500, latent_shape=(4, 2, 2))
        items = [data[k] for k in range(len(data))]
        times = np.array([item["timestep"] for item in items])
        assert times.min() < 10 and times.max() in range(990, 1000) and abs(times.mean() - 499.5) < 25
        counts = [sum(item["prompt"] == prompt for item in items) / len(items) for prompt in PROMPTS]
        assert all(abs(share - 1 / 3) < 0.04 for share in counts)
        noise = torch.stack([item["noise"] for item in items])
        assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02

    def test_ends(self):
        data = _dataset(steps=2)
        assert len(list(data)) == 8  # pyright: ignore[reportArgumentType]
        for k in (-1, 8):
            with pytest.raises(IndexError, match=f"item {k} of 8"):
                data[k]


def _examples(images: object, masks: object = None, resolution: int = 16) -> Examples:
    return examples_of(ConceptConfig("x", "cat", "<x>", images=images, masks=masks), resolution)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "mask").mkdir()
    for name, size in (("10.jpg", (80, 60)), ("2.png", (40, 40)), ("3.webp", (30, 90))):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(tmp_path / name)
        mask = np.zeros((size[1] // 2, size[0] // 2), np.uint8)
        mask[:10, :10] = 200
        Image.fromarray(mask).save(tmp_path / "mask" / f"{Path(name).stem}.png")
    return tmp_path


class TestLoadExamples:
    def test_with_and_without_masks(self, photos):
        examples = _examples(str(photos), "mask", 32)
        assert len(examples) == 3 and examples.names == ["2.png", "3.webp", "10.jpg"]
        assert examples.pixels.shape == (3, 3, 32, 32) and examples.pixels.dtype == torch.float32
        assert examples.masks is not None
        assert examples.masks.shape == (3, 1, 32, 32) and examples.masks.dtype == torch.float32
        assert torch.allclose(examples.masks.amax(dim=(1, 2, 3)), torch.tensor(200 / 255), atol=1e-3)
        # The objects lie in the corner, so the crops of the two long pictures moved there.
        assert all(examples.masks[k, 0, 0, 0] > 0.7 for k in range(3))
        plain = _examples(str(photos), None, 32)
        assert plain.masks is None
        assert torch.equal(plain.pixels[0], examples.pixels[0]) and not torch.equal(plain.pixels, examples.pixels)

    def test_a_mask_of_another_shape(self, photos):
        with pytest.raises(ConceptImageError, match=r"mask/2.png: the mask is 15x45, its image .*2.png is 40x40"):
            (photos / "mask" / "2.png").write_bytes((photos / "mask" / "3.png").read_bytes())
            _examples("2.png", "mask/2.png")

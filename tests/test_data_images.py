"""Which files are a concept's pictures, and that every kind of file gives the picture that a person sees."""

import io
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from perfusion.data import formats
from perfusion.data.images import ConceptImageError, find_images, read_image

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def _save(path: Path, size: tuple[int, int] = (12, 8), colour=RED, mode: str = "RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def _png16(path: Path, samples: np.ndarray, colour_type: int, transparent: bytes = b"") -> Path:
    """A PNG of 16 bits per sample, written by hand: PIL cannot write the colour ones."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    hidden = chunk(b"tRNS", transparent) if transparent else b""
    body = chunk(b"IHDR", header) + hidden + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def _noise(size: int = 96) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for name in ("10.jpg", "2.png", "1.webp"):
        _save(folder / name)
    shutil.copy(folder / "2.png", folder / "3")  # an image by its content, without a suffix
    shutil.copy(folder / "10.jpg", folder / "4.png")  # a JPEG that is called PNG
    (folder / "notes.txt").write_text("not a picture")
    (folder / ".DS_Store").write_bytes(b"\0\0")
    _save(folder / ".hidden.png")
    _save(folder / "mask" / "1.png")
    return folder


def _first(path: Path) -> np.ndarray:
    """The RGB of the first pixel, as integers that can be subtracted."""
    return np.asarray(read_image(path))[0, 0].astype(int)


def _names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


class TestFindImages:
    def test_folder_gives_its_images_naturally_sorted(self, photos):
        assert _names(find_images(str(photos))) == ["1.webp", "2.png", "3", "4.png", "10.jpg"]

    def test_glob_file_and_list(self, photos):
        assert _names(find_images("photos/*.png")) == ["2.png", "4.png"]
        assert _names(find_images("photos/1*")) == ["1.webp", "10.jpg"]
        assert _names(find_images("**/1.*")) == ["1.webp", "1.png"]
        assert _names(find_images("photos/10.jpg")) == ["10.jpg"]
        assert _names(find_images(["photos/10.jpg", "photos/*.png", "photos/mask"])) == [
            "10.jpg", "2.png", "4.png", "1.png",
        ]  # fmt: skip

    def test_duplicates_go_also_under_another_name(self, photos):
        (photos / "link.png").symlink_to(photos / "2.png")
        found = find_images(["photos/2.png", "photos", "./photos/../photos/*.png"])
        assert _names(found) == ["2.png", "1.webp", "3", "4.png", "10.jpg"]

    def test_a_path_that_exists_is_no_glob(self, tmp_path, monkeypatch):
        _save(tmp_path / "cat[1]" / "a.png")
        assert _names(find_images("cat[1]")) == ["a.png"]
        monkeypatch.chdir("cat[1]")
        assert _names(find_images("*.png")) == ["a.png"]

    def test_folder_without_images_says_what_it_holds(self, photos):
        for path in photos.iterdir():
            if path.is_file() and path.suffix != ".txt":
                path.unlink()
        with pytest.raises(ConceptImageError, match=r"images='photos'.*photos holds mask/, notes.txt\.$"):
            find_images("photos")
        (photos / "empty").mkdir()
        with pytest.raises(ConceptImageError, match="holds nothing"):
            find_images("photos/empty")

    def test_missing_path_says_what_is_there(self, photos):
        with pytest.raises(ConceptImageError, match=r"images='foto/cat': no such file or folder; .* holds photos/\.$"):
            find_images("foto/cat")
        with pytest.raises(ConceptImageError, match=r"it matches nothing; .* holds 1.webp, 2.png.*notes.txt"):
            find_images("photos/*.jpeg")
        with pytest.raises(ConceptImageError, match=r"it matches mask/, notes.txt\.$"):
            find_images("photos/[mn]*")

    @pytest.mark.parametrize(
        "content, found",
        [
            (b"", "an empty file"),
            (b"GIF89a..........", "a GIF file"),
            (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC"),
            (b"<!DOCTYPE html><html>", "a file that begins with b'<!DOCTYPE html><'"),
        ],
    )
    def test_a_file_that_only_calls_itself_an_image(self, photos, content, found, monkeypatch):
        monkeypatch.setattr(formats, "find_spec", lambda name: None)  # no pillow-heif
        (photos / "5.JPG").write_bytes(content)
        for spec in ("photos", "photos/*", "photos/5.JPG"):
            with pytest.raises(ConceptImageError, match=r"5\.JPG.*found " + found):
                find_images(spec)

    def test_pictures_of_other_kinds_are_passed_over_and_named(self, photos, capsys, monkeypatch):
        monkeypatch.setattr(formats, "find_spec", lambda name: None)
        (photos / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
        (photos / "scan.tif").write_bytes(b"II*\0")
        assert len(find_images(str(photos))) == 5
        said = capsys.readouterr().err
        assert (
            "passed over IMG_1.HEIC: HEIC files are read with the package pillow-heif (pip install pillow-heif)" in said
        )
        assert "passed over scan.tif: only JPEG, PNG, WebP, HEIC and AVIF are read" in said
        for path in photos.iterdir():
            if path.is_file() and path.suffix != ".HEIC":
                path.unlink()
        with pytest.raises(ConceptImageError, match=r"holds IMG_1.HEIC, mask/\. HEIC files are read with the package"):
            find_images(str(photos))
        with pytest.raises(ConceptImageError, match=r"found a HEIC file \(HEIC files are read with the package"):
            find_images(str(photos / "IMG_1.HEIC"))

    @pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
    def test_pictures_of_phones_are_read(self, kind, tmp_path):
        """Upright, whatever the file is called."""
        if kind == "HEIF":
            pytest.importorskip("pillow_heif").register_heif_opener()
        picture = np.zeros((40, 64, 3), np.uint8)
        picture[:20], picture[20:, :32] = (250, 10, 10), (10, 10, 250)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned to the right
        Image.fromarray(picture).save(tmp_path / "IMG_1.heic", format=kind, quality=95, exif=exif.tobytes())
        (path,) = find_images(str(tmp_path))
        read = np.asarray(read_image(path)).astype(int)
        assert read.shape == (64, 40, 3)
        assert np.abs(read - np.rot90(picture, -1)).mean() < 8
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ConceptImageError, match=f"unreadable, truncated or damaged {kind} file"):
            read_image(path)

    def test_a_mask_among_the_pictures_is_an_error(self, photos):
        for name in ("2_mask.png", "10-mask.jpg"):
            _save(photos / name)
            with pytest.raises(ConceptImageError, match=f"found {name} beside a picture .*concept.masks"):
                find_images(str(photos))
            (photos / name).unlink()
        _save(photos / "carnival_mask.png")  # of nobody here
        assert len(find_images(str(photos))) == 6

    def test_a_broken_link_is_not_passed_over(self, photos):
        (photos / "6.jpg").symlink_to(photos / "gone.jpg")
        with pytest.raises(ConceptImageError, match=r"6.jpg: cannot be opened: No such file"):
            find_images("photos")


class TestReadImage:
    @pytest.mark.parametrize("suffix, orientation", [*((".jpg", k) for k in range(1, 9)), (".png", 5), (".webp", 6)])
    def test_exif_orientation(self, tmp_path, orientation, suffix):
        upright = np.zeros((16, 24, 3), np.uint8)
        upright[:8, :8], upright[8:, 16:] = RED, BLUE
        # What a camera stores, so that the picture is upright once it is turned as the orientation says.
        stored = {
            1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
            5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1),
            7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1),
        }[orientation]  # fmt: skip
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}, ".png": {}}[suffix]
        path = tmp_path / f"turned{suffix}"
        Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **options)
        image = read_image(path)
        assert image.mode == "RGB" and image.size == (24, 16)
        assert np.abs(np.asarray(image).astype(int) - upright).max() <= 3

    @pytest.mark.parametrize(
        ("name", "mode", "colour", "shown"),
        [
            ("a.jpg", "CMYK", (0, 255, 255, 0), RED),
            ("a.png", "L", 77, (77, 77, 77)),
            ("a.png", "1", 1, WHITE),
            ("a.png", "LA", (0, 0), WHITE),
        ],
    )
    def test_other_modes(self, tmp_path, name, mode, colour, shown):
        assert np.abs(_first(_save(tmp_path / name, colour=colour, mode=mode)) - shown).max() <= (
            3 if mode == "CMYK" else 0
        )

    def test_palette(self, tmp_path):
        image = Image.new("P", (4, 4), 1)
        image.putpalette([0, 0, 0, 9, 90, 190])
        image.save(tmp_path / "a.png")
        assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (9, 90, 190)
        image.save(tmp_path / "b.png", transparency=1)
        assert read_image(tmp_path / "b.png").getpixel((0, 0)) == WHITE

    @pytest.mark.parametrize("name", ["a.png", "a.webp"])
    def test_hidden_colour_never_shows(self, tmp_path, name):
        pixels = np.zeros((4, 8, 4), np.uint8)
        pixels[:, :4] = (255, 0, 0, 0)
        pixels[:, 4:] = (0, 0, 255, 128)
        exact: dict[str, Any] = {"lossless": True, "exact": True} if name == "a.webp" else {}
        Image.fromarray(pixels).save(tmp_path / name, **exact)
        image = read_image(tmp_path / name)
        assert image.getpixel((0, 0)) == WHITE
        assert image.getpixel((7, 0)) == (127, 127, 255)

    def test_sixteen_bits_are_scaled(self, tmp_path):
        ramp = np.array([[0, 257, 1000, 32768, 65535]], np.uint16)
        expected = np.array([0, 1, 4, 128, 255])
        grey = np.asarray(read_image(_png16(tmp_path / "grey.png", ramp, 0)))
        assert (grey == expected[None, :, None]).all()
        colour = np.asarray(read_image(_png16(tmp_path / "rgb.png", np.stack([ramp] * 3, -1), 2))).astype(int)
        assert np.abs(colour - expected[None, :, None]).max() <= 1
        hidden = np.asarray(read_image(_png16(tmp_path / "key.png", ramp, 0, struct.pack(">H", 1000))))
        assert hidden[0, :, 0].tolist() == [0, 1, 255, 128, 255]
        rgba = np.stack([ramp, ramp, ramp, np.zeros_like(ramp)], -1)
        assert (np.asarray(read_image(_png16(tmp_path / "rgba.png", rgba, 6))) == 255).all()

    def test_colour_profile_is_brought_to_srgb(self, tmp_path):
        srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
        swapped = srgb.replace(b"rXYZ", b"tmp!").replace(b"bXYZ", b"rXYZ").replace(b"tmp!", b"bXYZ")
        swapped = swapped.replace("sRGB".encode("utf-16-be"), "qRGB".encode("utf-16-be"))
        path = _save(tmp_path / "a.png", colour=RED, icc_profile=bytes(swapped))
        assert np.abs(_first(path) - BLUE).max() <= 3
        assert read_image(_save(tmp_path / "b.png", icc_profile=bytes(srgb))).getpixel((0, 0)) == RED
        assert read_image(_save(tmp_path / "c.png", icc_profile=b"rubbish")).getpixel((0, 0)) == RED

    def test_several_pictures_in_one_file_give_the_first(self, tmp_path):
        first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)
        kinds: dict[str, dict[str, Any]] = {"a.jpg": {"format": "MPO"}, "a.webp": {"lossless": True}, "a.png": {}}
        for name, options in kinds.items():
            first.save(tmp_path / name, save_all=True, append_images=[second], **options)
            assert np.abs(_first(tmp_path / name) - RED).max() <= 3

    @pytest.mark.parametrize("options", [{"format": "JPEG"}, {"format": "JPEG", "progressive": True},
                                         {"format": "PNG"}, {"format": "WEBP"}])  # fmt: skip
    @pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
    def test_truncated(self, tmp_path, options, share):
        data = io.BytesIO()
        _noise().save(data, **options)
        path = tmp_path / "cat.jpg"
        path.write_bytes(data.getvalue())
        assert read_image(path).size == (96, 96)
        path.write_bytes(data.getvalue()[: int(share * len(data.getvalue()))])
        with pytest.raises(ConceptImageError, match=rf"cat\.jpg: unreadable, truncated or damaged {options['format']}"):
            read_image(path)

    @pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
    def test_damaged_bytes_raise_nothing_else(self, tmp_path, form):
        data = io.BytesIO()
        _noise(32).save(data, form)
        rng = np.random.default_rng(1)
        path = tmp_path / "a.img"
        refused = 0
        for _ in range(60):
            damaged = np.frombuffer(data.getvalue(), np.uint8).copy()
            damaged[rng.integers(12, len(damaged), 6)] = rng.integers(0, 256, 6)
            path.write_bytes(damaged.tobytes())
            try:
                read_image(path)
            except ConceptImageError as error:
                assert str(path) in str(error)
                refused += 1
        assert refused > 0

    def test_bombs_are_refused(self, tmp_path, monkeypatch):
        path = _save(tmp_path / "a.png", size=(30, 30))
        for limit in (899, 400):  # PIL itself only warns in the first case
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            with pytest.raises(ConceptImageError, match=r"a\.png: too large .* \(900 pixels\)"):
                read_image(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
        assert read_image(path).size == (30, 30)

    def test_other_formats_and_missing_files(self, tmp_path):
        _noise().save(tmp_path / "a.gif")
        with pytest.raises(ConceptImageError, match=r"a\.gif: expected .*, found a GIF file"):
            read_image(tmp_path / "a.gif")
        with pytest.raises(ConceptImageError, match=r"b\.png: cannot be opened: No such file"):
            read_image(tmp_path / "b.png")


@pytest.mark.parametrize("spec", [2023, [2023]])
def test_a_folder_named_by_a_year_is_no_number(tmp_path: Path, spec: object) -> None:
    """As YAML reads `concept.images=2023`."""
    picture = _save(tmp_path / "2023" / "a.png")
    assert find_images(spec) == [picture]

"""What pictures are drawn from besides their prompts, by the pipelines that diffusers has for it: a picture to start
from, a mask of what is drawn anew in it, and a picture that a ControlNet follows."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import ControlNetModel, DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from PIL import Image, ImageOps

from perfusion.config import ConfigError
from perfusion.data.images import ConceptImageError, read_image
from perfusion.data.masks import check_aspect, read_mask
from perfusion.files import first_line
from perfusion.hub import offline

_STRENGTH, _STRENGTH_MASKED = 0.8, 1.0  # diffusers' own
_MULTIPLE = 8  # pixels of a side that the autoencoders of these pipelines make one of
_LONGEST = 4  # times the shorter side that a picture's longer one may have where no size is asked for
_DIGITS = 12  # of a file's sha256
_KNOWN_CHANNELS = 4  # of the latents that diffusers' inpainting takes for latents


@dataclass(frozen=True)
class Conditions:
    """What was asked for, read from its files and checked; nothing of it needs a model.

    Attributes:
        image: to start from; RGB.
        strength: how much of it is drawn anew, in (0, 1].
        mask: what of it is drawn anew, white, and what stays, black; 8-bit grey, of the picture's aspect ratio.
        controlnet: folder or hub id of a diffusers ControlNet.
        control_image: what it follows; RGB.
        controlnet_scale: how closely.
        recorded: the same for the record of a picture; files with a digest.
    """

    image: Image.Image | None
    strength: float
    mask: Image.Image | None
    controlnet: str | None
    control_image: Image.Image | None
    controlnet_scale: float
    recorded: Mapping[str, Any]

    @property
    def steering(self) -> Mapping[str, Any] | None:
        """The config of the ControlNet, without its weights; None where there is none. Raises ConfigError."""
        if self.controlnet is None:
            return None
        with _reading(self.controlnet):
            found: Any = ControlNetModel.load_config(self.controlnet, local_files_only=_local(self.controlnet))
            if found.get("_class_name") != ControlNetModel.__name__:
                raise ConfigError(f"it is a {found.get('_class_name')}, expected a {ControlNetModel.__name__}")
        return found

    def check_steps(self, steps: int) -> None:
        """Hold that of `steps` denoising steps some are left. Raises ConfigError."""
        if self.image is not None and int(steps * self.strength) < 1:
            raise ConfigError(
                f"strength: found {self.strength:g} of {steps} steps, which leaves none, expected {1 / steps:g} or more"
            )

    def size(self, asked: tuple[int, int] | None, resolution: int) -> tuple[int, int] | None:
        """Width and height of the pictures: those that were asked for; else the shape of the picture to start from, or
        of the one to follow, its shorter side `resolution`. None where nothing says so.

        Raises:
            ConfigError: a picture so long that its shape cannot be meant.
        """
        key, picture = ("image", self.image) if self.image is not None else ("control_image", self.control_image)
        if asked is not None or picture is None:
            return asked
        if max(picture.size) > _LONGEST * min(picture.size):
            raise ConfigError(
                f"{key}: found {picture.width}x{picture.height} pixels, expected a longer side of at most {_LONGEST} "
                "times the shorter, or width= and height=, which crop it"
            )
        wide, high = (round(side * resolution / min(picture.size) / _MULTIPLE) * _MULTIPLE for side in picture.size)
        return max(wide, _MULTIPLE), max(high, _MULTIPLE)

    @contextmanager
    def pipeline(self, pipe: DiffusionPipeline) -> Iterator[Any]:
        """The pipeline of diffusers that draws from these, made of the parts of `pipe`, which may have concepts
        attached; `pipe` itself where there is nothing to draw from.

        Raises:
            ConfigError: the ControlNet cannot be read, or diffusers has no such pipeline for this model.
        """
        if self.image is None and self.controlnet is None:
            yield pipe
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # this imports all pipelines, a scripted ChatGLM among them
            from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
        auto: Any = AutoPipelineForText2Image
        if self.image is not None:
            auto = AutoPipelineForImage2Image if self.mask is None else AutoPipelineForInpainting
        more = {} if self.controlnet is None else {"controlnet": self._controlnet(pipe)}
        try:
            made = auto.from_pipe(pipe, add_watermarker=False, **more)
        except ValueError as error:  # PixArt and Sana have some of these pipelines or none
            key = "controlnet" if self.image is None else "image" if self.mask is None else "mask"
            raise ConfigError(f"{key}: diffusers cannot draw so with a {type(pipe).__name__}") from error
        with nullcontext() if self.mask is None else _inpainting_of_any_width(made):
            yield made

    def _controlnet(self, pipe: Any) -> ControlNetModel:
        assert self.controlnet is not None
        with _reading(self.controlnet):
            net: Any = ControlNetModel.from_pretrained(
                self.controlnet,
                torch_dtype=pipe.unet.dtype,
                use_safetensors=True,
                local_files_only=_local(self.controlnet),
            )
        return net.to(pipe.unet.device).requires_grad_(False).eval()

    def arguments(self, size: tuple[int, int] | None) -> dict[str, Any]:
        """What that pipeline's call takes, its pictures brought to `size`, cropped centrally where need be."""
        given: dict[str, Any] = {}
        if size is None:
            return given
        if self.image is not None:
            given |= {"image": _fitted(self.image, size), "strength": self.strength}
        if self.mask is not None:
            given["mask_image"] = _fitted(self.mask, size)
        if self.control_image is not None:
            given["image" if self.image is None else "control_image"] = _fitted(self.control_image, size)
            given["controlnet_conditioning_scale"] = self.controlnet_scale
        return given


def read_conditions(
    image: str | None,
    strength: float | None,
    mask: str | None,
    controlnet: str | None,
    control_image: str | None,
    controlnet_scale: float | None,
) -> Conditions:
    """Read and check the options of these names; all of them None: nothing is drawn from.

    Raises:
        ConfigError: an option that lacks another one, or is out of its range.
        ConceptImageError: a picture or mask that cannot be read, or a mask of another shape than its picture.
    """
    for key, value, without in (
        ("strength", strength, {"image": image}),
        ("mask", mask, {"image": image}),
        ("control_image", control_image, {"controlnet": controlnet}),
        ("controlnet_scale", controlnet_scale, {"controlnet": controlnet}),
        ("controlnet", controlnet, {"control_image": control_image}),
    ):
        ((other, found),) = without.items()
        if value is not None and found is None:
            raise ConfigError(f"{key}: found {value!r} without {other}, expected {other}= beside it")
    if strength is not None and not 0 < strength <= 1:
        raise ConfigError(f"strength: found {strength:g}, expected more than 0 (the picture as it is), 1 at most")
    scale = 1.0 if controlnet_scale is None else controlnet_scale
    if not 0 <= scale < np.inf:
        raise ConfigError(f"controlnet_scale: found {scale:g}, expected a finite number, at least 0")
    strength = strength or (_STRENGTH if mask is None else _STRENGTH_MASKED)
    start = None if image is None else _read("image", image)
    return Conditions(
        image=start,
        strength=strength,
        mask=None if mask is None or start is None or image is None else _read_mask(mask, start, Path(image)),
        controlnet=controlnet,
        control_image=None if control_image is None else _read("control_image", control_image),
        controlnet_scale=scale,
        recorded={
            "image": _name(image),
            "strength": None if image is None else strength,
            "mask": _name(mask),
            "controlnet": None if controlnet is None else f"{Path(controlnet).name} {scale:g}",
            "control_image": _name(control_image),
        },
    )


@contextmanager
def _inpainting_of_any_width(pipe: Any) -> Iterator[None]:
    """Have diffusers' inpainting draw into latents of any number of channels, such as Toyland's 8. It knows models that
    are not given the mask by the number 4, but does nothing that would need that number."""
    config = pipe.unet.config
    pipe.unet._internal_dict = FrozenDict({**config, "in_channels": _KNOWN_CHANNELS})
    try:
        yield
    finally:
        pipe.unet._internal_dict = config


def _read(key: str, file: str) -> Image.Image:
    path = Path(file).expanduser()
    try:
        return read_image(path)
    except ConceptImageError as error:
        raise ConceptImageError(f"{key}: {error}") from error


def _read_mask(file: str, image: Image.Image, image_path: Path) -> Image.Image:
    """A mask of the picture, its strongest value white."""
    path = Path(file).expanduser()
    try:
        mask = read_mask(path)
        check_aspect(mask, path, image, image_path)
    except ConceptImageError as error:
        raise ConceptImageError(f"mask: {error}") from error
    return Image.fromarray((mask / mask.max() * 255).round().astype(np.uint8))


def _fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS if image.mode == "RGB" else Image.Resampling.BILINEAR)


def _name(file: str | None) -> str | None:
    """A file's name, and what tells it from others of that name."""
    if file is None:
        return None
    path = Path(file).expanduser()
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:_DIGITS]}"


def _local(name: str) -> bool:
    return Path(name).expanduser().exists() or offline()


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what diffusers and the hub raise into one ConfigError that names the ControlNet."""
    try:
        if not Path(name).expanduser().exists() and name.count("/") != 1:
            raise ConfigError("found no such folder")
        yield
    except Exception as error:  # whatever a library makes of files that are not what it expects
        reason = first_line(error)
        raise ConfigError(
            f"controlnet: {name} cannot be read: {reason}. Expected the folder or hub id (owner/name) of a "
            "diffusers ControlNet, with safetensors weights"
        ) from error

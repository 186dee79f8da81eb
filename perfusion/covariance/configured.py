"""Where the `C` of a config comes from, captions or a ready matrix, and how a concept file tells which it was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perfusion.config import ConfigError, CovarianceConfig
from perfusion.covariance.cache import PartialSum, cached_second_moment
from perfusion.covariance.captions import Captions
from perfusion.covariance.factor import factorise
from perfusion.covariance.matrix import Matrix, load_matrix
from perfusion.covariance.moment import CovarianceError
from perfusion.covariance.stream import accumulate

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

POSITIONS = ("all", "words")
CAPTION_BATCH = 64
_ENCODERS = ("text_encoder", "tokenizer")  # what key inputs begin with that say whose encodings they are
_KEY = "backbone.covariance"

_log = logging.getLogger(__name__)


def check_settings(settings: CovarianceConfig) -> None:
    """Raise ConfigError if `positions` is neither `all` nor `words`, or `count` below 1."""
    if settings.count < 1:
        raise ConfigError(f"{_KEY}.count: found {settings.count}, expected at least 1")
    if settings.positions not in POSITIONS:
        raise ConfigError(f"{_KEY}.positions: found {settings.positions!r}, expected {' or '.join(POSITIONS)}")


def word_positions(tokenizer: PreTrainedTokenizerBase, inputs: BatchEncoding) -> Tensor:
    """(B, N) bool, on the CPU: where the tokens of the captions are, that is neither beginning, end nor padding.

    `inputs` has `input_ids` (B, N) and `attention_mask` (B, N), as the tokenizer gave them. The mask alone says what is
    padding: the token of it may be a word as well, as "!" is for the tokenizers of SD 2.x.
    """
    where = inputs["attention_mask"].bool()
    for special in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if special is not None:
            where &= inputs["input_ids"] != special
    return where


def measured(
    settings: CovarianceConfig,
    captions: Captions,
    encode: Callable[[list[str]], Tensor],
    key: Mapping[str, object] | None,
    progress: bool,
) -> Matrix:
    """`C` of `captions`, from the cache when it holds it; interrupted, it goes on where it stopped.

    `encode`: see `accumulate`. `key`: everything that `C` depends on, see `cached_second_moment`; None: it shall
    neither be read from the cache nor written there.

    Raises:
        CovarianceError: no position of any caption counts, or an encoding is not finite.
    """
    if key is None:
        moment = accumulate(captions, encode, CAPTION_BATCH, progress)
    else:
        folder = Path(settings.cache).expanduser()
        partial = PartialSum(key, folder)
        moment = cached_second_moment(
            key, lambda: accumulate(captions, encode, CAPTION_BATCH, progress, partial), folder
        )
    return Matrix(moment.value(), moment.count, {**_plain(settings), **(key or {}), "name": _name(settings, key)})


def imported(settings: CovarianceConfig, encoder: Mapping[str, object] | None = None) -> Matrix:
    """The `C` in the file that `settings.matrix` names.

    With `encoder` (the key inputs that say whose encodings these are), a file of this project that was made of another
    text encoder is logged as a warning. Its origin is given only where it is sure to hold; else it is the digest.

    Raises:
        CovarianceError: see `load_matrix`.
    """
    assert settings.matrix is not None
    try:
        matrix = load_matrix(Path(settings.matrix).expanduser())
    except CovarianceError as error:
        raise CovarianceError(f"{_KEY}.matrix: {error}") from error
    origin = matrix.origin
    if encoder is not None and origin:
        parts = [part for part in encoder if part.startswith(_ENCODERS) and "matrix" not in origin]
        differing = [part for part in parts if origin.get(part) != encoder[part]]
        if differing:
            part = differing[0]
            _log.warning(
                "%s.matrix: %s was measured on another model: found %s %s, expected %s",
                *(_KEY, settings.matrix, part, origin.get(part), encoder[part]),
            )
            origin = {}
    known = {"name", "count", "positions"} <= {*origin} or "matrix" in origin
    return Matrix(matrix.C, matrix.count, origin if known else {"matrix": matrix.digest})


def check_not_inverse(settings: CovarianceConfig, matrix: Matrix, encodings: Tensor) -> None:
    """Hold that a matrix from a file is C, not C⁻¹, which other implementations save, and which is as positive.

    C has its large directions where encodings (..., d) of the model have theirs, C⁻¹ its small ones: the cosine between
    either and their second moment tells.

    Raises:
        CovarianceError: the inverse is like them, and the matrix is not.
    """
    sample = encodings.detach().cpu().double().flatten(0, -2)
    C = matrix.C
    if C.shape[0] != sample.shape[1]:
        return  # `factorise` says so
    own = sample.T @ sample
    small = 1e-6 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    likeness = [float((own * A).sum() / (own.norm() * A.norm())) for A in (C, torch.linalg.pinv(C + small))]
    if likeness[1] > 0.5 > 2 * likeness[0]:
        raise CovarianceError(
            f"{_KEY}.matrix: {settings.matrix}: found the inverse of a second moment (its own inverse is like that of "
            f"this model's encodings, cosine {likeness[1]:.2f}, and it is not, {likeness[0]:.2f}), expected C itself"
        )


def factorised(settings: CovarianceConfig, matrix: Matrix, dimension: int | None) -> Tensor:
    """`matrix` with the ridge of `settings`, as its lower Cholesky factor.

    Raises:
        CovarianceError: see `factorise`; of a matrix from a file, the message names the file.
    """
    try:
        return factorise(matrix.C, settings.ridge, dimension)
    except CovarianceError as error:
        if settings.matrix is None:
            raise
        raise CovarianceError(f"{_KEY}.matrix: {settings.matrix}: {error}") from error


def described(settings: CovarianceConfig, origin: Mapping[str, object] | None) -> str:
    """What a `C` was made of, in few words that are equal for equal `C` only.

    - `everyday:10000:0.01`: captions, count, ridge; `:words` follows where padding and special tokens were left out
    - `mine.txt@1a2b3c4d:800:0.01`: captions of a file, with the first digits of their hash
    - `matrix@0123456789ab:0.01`: a matrix that was given, with the first digits of its hash. One that this project
      wrote for the same text encoder is described as what it was made of, for it is the same.

    `origin` is that of the matrix; None where no `C` was asked for yet, and then captions of a file have no hash.
    """
    if origin is None:
        origin = {"matrix": "?"} if settings.matrix else {**_plain(settings), "name": _name(settings, None)}
    if "matrix" in origin:
        return f"matrix@{origin['matrix']}:{settings.ridge:g}"
    end = "" if origin["positions"] == "all" else f":{origin['positions']}"
    return f"{origin['name']}:{origin['count']}:{settings.ridge:g}{end}"


def spelled_out(covariance: str) -> str:
    """What `described` gave, with the names of its parts in brackets."""
    parts = ["matrix@digest"] if covariance.startswith("matrix@") else ["captions", "count"]
    parts += ["ridge", "positions"]
    return f"{covariance} ({':'.join(parts[: covariance.count(':') + 1])})"


def _plain(settings: CovarianceConfig) -> dict[str, object]:
    return {"count": settings.count, "positions": settings.positions}


def _name(settings: CovarianceConfig, key: Mapping[str, object] | None) -> str:
    """What captions are called: the name of a built-in set, or of a file, with the first digits of their hash."""
    path = Path(settings.captions).expanduser()
    if key is None or not path.is_file():
        return path.name
    return f"{path.name}@{str(key['captions'])[:8]}"

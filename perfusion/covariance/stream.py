"""From captions to the sum behind C, one batch in memory at a time."""

from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice

import torch
from torch import Tensor
from tqdm.auto import tqdm

from perfusion.covariance.moment import CovarianceError, SecondMoment


def accumulate(
    captions: Iterable[str],
    encode: Callable[[list[str]], Tensor],
    batch_size: int,
    progress: bool = False,
) -> SecondMoment:
    """Second moment of the encodings of `captions`, one batch in memory at a time.

    `encode` takes a list of B captions and returns (B, N, d), all positions, as the cross-attention sees them;
    it runs without gradients. `progress` shows a bar. Raises CovarianceError for no captions or a batch size below 1.
    """
    if batch_size < 1:
        raise CovarianceError(f"batch size of captions: found {batch_size}, expected at least 1")
    moment = None
    size = len(captions) if isinstance(captions, Sized) else None
    with torch.no_grad(), tqdm(total=size, desc="second moment", unit="caption", disable=not progress) as bar:
        for batch in _batches(captions, batch_size):
            encodings = encode(batch)
            assert encodings.dim() == 3 and len(encodings) == len(batch), (
                f"encode gave {tuple(encodings.shape)} for {len(batch)} captions, expected (B, N, d)"
            )
            if moment is None:
                moment = SecondMoment.empty(encodings.shape[-1])
            moment.update(encodings)
            bar.update(len(batch))
    if moment is None:
        raise CovarianceError("captions: found none, expected at least one")
    return moment


def _batches(captions: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(captions)
    while batch := list(islice(iterator, size)):
        yield batch

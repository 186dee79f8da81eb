"""From captions to the sum behind C, one batch in memory at a time."""

from collections.abc import Callable, Iterable, Sized
from itertools import islice

import torch
from torch import Tensor

from perfusion.bars import Bar
from perfusion.covariance.cache import PartialSum
from perfusion.covariance.moment import CovarianceError, SecondMoment


def accumulate(
    captions: Iterable[str],
    encode: Callable[[list[str]], Tensor],
    batch_size: int,
    progress: bool = False,
    partial: PartialSum | None = None,
) -> SecondMoment:
    """Second moment of the encodings of `captions`, one batch in memory at a time.

    `encode` takes a list of B captions and returns (B, N, d), all positions, as the cross-attention sees them, or
    (M, d), the positions that shall count; it runs without gradients. `progress` shows a bar, with an end where
    `captions` has a length. With `partial` the sum goes on where an interrupted one stopped, and says so if it is
    interrupted itself; the result is the same to the last bit.
    Raises CovarianceError for no captions.
    """
    moment = None if partial is None else partial.load(batch_size)
    done = 0 if partial is None else partial.captions
    size = len(captions) if isinstance(captions, Sized) else None
    rest = islice(captions, done, None)
    bar = Bar(total=size, initial=done, desc="second moment", unit="caption", disable=not progress)
    try:
        with torch.no_grad(), bar:
            while batch := list(islice(rest, batch_size)):
                encodings = encode(batch)
                assert encodings.dim() == 2 or (encodings.dim() == 3 and len(encodings) == len(batch)), (
                    f"encode gave {tuple(encodings.shape)} for {len(batch)} captions, expected (B, N, d) or (M, d)"
                )
                if moment is None:
                    moment = SecondMoment.empty(encodings.shape[-1])
                moment.update(encodings)
                done += len(batch)
                bar.update(len(batch))
                if partial is not None:
                    partial.save(moment, done, batch_size)
    except KeyboardInterrupt as error:
        if partial is None:
            raise
        raise KeyboardInterrupt(f"stopped; the same command goes on after caption {partial.captions}") from error
    if moment is None:
        raise CovarianceError("captions: found none, expected at least one")
    return moment

"""Whether the Hugging Face hub can be reached at all."""

from __future__ import annotations

import functools

from huggingface_hub import constants
from huggingface_hub.utils import get_session

SECONDS = 5.0  # a network that does not answer in this time would be waited for in vain, minutes for every file


@functools.cache
def offline() -> bool:
    """True if the hub does not answer, or is not to be asked (`HF_HUB_OFFLINE=1`): then its cache alone counts."""
    if constants.HF_HUB_OFFLINE:
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # of the hub's HTTP library, whichever that is, or of the operating system
        return True
    return False

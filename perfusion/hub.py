"""The Hugging Face hub: whether it can be reached, and repositories that hold one concept each.

Such a repository has `concept.safetensors`, a card (`README.md`) and, if asked for, `samples.png`. Who may read or
write it is for the login of huggingface_hub to say (`hf auth login`, or `HF_TOKEN`); no token is stored here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import get_session, validate_repo_id

from perfusion.files import PathLike, first_line

SECONDS = 5.0  # a network that does not answer in this time would be waited for in vain, minutes for every file
PREFIX = "hub:"  # of what commands take for a concept
CONCEPT, CARD, SAMPLES = "concept.safetensors", "README.md", "samples.png"  # files of a repository


class HubError(ValueError):
    """A concept that the hub does not give or take; names the repository and the cause."""


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


def named_file(given: str) -> Path:
    """What a command's `concept=` names: a path as it stands, or a file of the hub, downloaded into its cache, as
    `hub:owner/name`, or `hub:owner/name@revision`, where the revision is a branch, tag or commit.

    Raises:
        HubError: the hub does not give it.
    """
    if not given.startswith(PREFIX):
        return Path(given).expanduser()
    repository, _, revision = given.removeprefix(PREFIX).partition("@")
    return download(repository, revision or None)


def download(
    repository: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache: PathLike | None = None,
    local_files_only: bool = False,
) -> Path:
    """The concept file of a repository, in the hub's cache or downloaded into it. What it holds is not looked at.

    Raises:
        HubError: no such repository, none that may be read, no concept in it, or no network.
    """
    _check_name(repository)
    local = local_files_only or offline()
    folder = None if cache is None else Path(cache)
    try:
        return Path(
            hf_hub_download(
                repository, CONCEPT, revision=revision, token=token, cache_dir=folder, local_files_only=local
            )
        )
    except Exception as error:  # of the hub's own classes, of its HTTP library, or of the operating system
        if isinstance(error, EntryNotFoundError) and not local:
            raise HubError(
                f"{PREFIX}{repository}: found no {CONCEPT} in it, expected a concept's repository"
            ) from error
        where = "in the hub's cache, and the hub is not asked or cannot be reached" if local else "that may be read"
        raise HubError(
            f"{PREFIX}{repository}: found no such repository {where} ({first_line(error)}); a private one takes a "
            "login (`hf auth login`)"
        ) from error


def upload(
    repository: str,
    files: Mapping[str, Path | bytes],
    card: str,
    message: str,
    private: bool,
    token: str | bool | None = None,
    revision: str | None = None,
) -> str:
    """Commit files to a repository, which is made if it is not there; returns the commit's address.

    A card that is there stays as it is: somebody may have written into it.

    Raises:
        HubError: the hub cannot be reached, or does not allow it.
    """
    _check_name(repository)
    if offline():
        raise HubError(f"{PREFIX}{repository}: found no way to the hub: it is not asked or cannot be reached")
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if not api.file_exists(repository, CARD, revision=revision):
            files = {**files, CARD: card.encode()}
        added = [CommitOperationAdd(name, content) for name, content in files.items()]
        return str(api.create_commit(repository, added, commit_message=message, revision=revision).commit_url)
    except Exception as error:  # of the hub's own classes, of its HTTP library, or of the operating system
        raise HubError(
            f"{PREFIX}{repository}: the hub did not take it ({first_line(error)}); writing takes a login "
            "(`hf auth login`)"
        ) from error


def _check_name(repository: str) -> None:
    try:
        validate_repo_id(repository)
    except ValueError:
        valid = False
    else:
        valid = repository.count("/") == 1
    if not valid:
        raise HubError(f"{PREFIX}{repository}: found {repository!r}, expected the name of a repository, owner/name")

"""Models of the Hugging Face hub: fetched into its cache, pickles and code excepted."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from edkm_export.errors import InputError
from edkm_export.reference.load_errors import first_line

__all__ = ["commit_of", "fetch"]

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*"]
# Of the folders only those of sentence-transformers' modules (1_Pooling) belong to a model.
_LEFT_OUT = ["[!0-9]*/*", "*/*/*", "consolidated*", "adapter_model*"]
_PATIENCE_S = 10.0


@functools.cache
def commit_of(name: str) -> str:
    """The commit of a hub model that is used by this process.

    The hub is asked once, without retries. Where it cannot be reached, the model in its cache is used.

    Args:
        name: its id, OWNER/NAME.

    Raises:
        InputError: there is no such model, or the hub cannot be reached and the cache does not hold it.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    hub = _address()
    try:
        found = huggingface_hub.HfApi(endpoint=hub).model_info(name, timeout=_PATIENCE_S)
    except Exception as error:  # of a network: the HTTP library below the hub's has its own classes
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, GatedRepoError):
            raise InputError(
                f"{name}: the hub {hub} wants its terms accepted first; accept them there, and log in with "
                "`hf auth login`."
            ) from error
        if (
            isinstance(error, RepositoryNotFoundError) or status == 401
        ):  # what is private is not told from nothing
            raise InputError(
                f"{name}: no such folder here, and the hub {hub} has no such model; check the name, or log in with "
                "`hf auth login` if it is private."
            ) from error
        if (cached := _cached(name)) is not None:
            return cached
        reason = first_line(error) if status is None else f"status {status}"
        raise InputError(
            f"{name}: no such folder here, and the hub {hub} cannot be reached ({reason}); check the name and the "
            "network."
        ) from error
    assert found.sha is not None
    return str(found.sha)


def fetch(name: str, files: list[str] | None = None) -> Path:
    """Folder with the files of a hub model, at the commit of `commit_of`.

    Args:
        name: its id.
        files: patterns of those that are wanted; None: what a model needs.

    Raises:
        InputError: there is no such model, or the hub cannot be reached and the cache does not hold it.
    """
    import huggingface_hub

    revision = commit_of(name)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=files or _FILES,
                ignore_patterns=_LEFT_OUT,
                endpoint=_address(),
            )
        )
    except Exception as error:  # see above
        raise InputError(
            f"{name}: cannot be fetched from the hub {_address()} ({first_line(error)}); check the network, what is "
            "there already is not fetched again."
        ) from error


def _address() -> str:
    """Of the hub; HF_ENDPOINT names another one."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or str(constants.ENDPOINT)).rstrip("/")


def _cached(name: str) -> str | None:
    """The commit that was fetched last, if its files are still there."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
    found = sorted(folder.glob("*/config.json"), key=lambda path: path.lstat().st_mtime_ns)
    return found[-1].parent.name if found else None

"""A hub as `push` uses it, through huggingface_hub; what goes wrong there is said in one sentence."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edkm_export._version import __version__
from edkm_export.cli.console import err
from edkm_export.errors import EdkmExportError, InputError
from edkm_export.model_card import FILE

if TYPE_CHECKING:
    from edkm_export.cli.upload import Upload

__all__ = ["HubClient"]

_TRANSPORTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3", "socket", "ssl")


class HubClient:
    """Sends a folder as one commit, so that it arrives whole or not at all.

    Args:
        repo: owner/name.

    Attributes:
        endpoint: of the hub, as HF_ENDPOINT says.
    """

    def __init__(self, repo: str) -> None:
        from huggingface_hub import constants

        self.repo = repo
        self.endpoint: str = constants.ENDPOINT
        self._token: str | None = None

    @property
    def address(self) -> str:
        """Where people find it."""
        return f"{self.endpoint}/{self.repo}"

    def log_in(self) -> None:
        """Find the token.

        Raises:
            InputError: there is none.
        """
        import huggingface_hub

        self._token = huggingface_hub.get_token()
        if not self._token:
            raise InputError(
                f"{self.endpoint}: not logged in; run `hf auth login`, or set HF_TOKEN to a token with write access "
                f"({self.endpoint}/settings/tokens)."
            )

    def send(self, upload: Upload, *, private: bool, revision: str | None, message: str) -> str:
        """After `log_in`, make the repository and the branch where they are missing, and commit.

        Args:
            upload: what goes.
            private: of a repository that is made.
            revision: branch; None: main.
            message: of the commit.

        Returns:
            Digits of the commit.

        Raises:
            InputError: no permission, a hub that does not answer or answers with an error, or a repository
                that is public although `private` is wanted.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(token=self._token, library_name="edkm-export", library_version=__version__)
        operations = [
            CommitOperationAdd(file.name, upload.card.encode() if file.name == FILE else str(file.path))
            for file in upload.files
        ]
        with self._explaining(revision), _warnings_as_lines(), _without_bars():
            api.create_repo(self.repo, private=private or None, exist_ok=True)
            if private and not api.repo_info(self.repo).private:
                raise InputError(
                    f"{self.address}: is there already, and public; --private is for a new one. Make it private in its "
                    "settings, or choose another name."
                )
            if revision is not None:
                api.create_branch(self.repo, branch=revision, exist_ok=True)
            done: Any = api.create_commit(self.repo, operations, commit_message=message, revision=revision)
        return str(done.oid)

    @contextlib.contextmanager
    def _explaining(self, revision: str | None) -> Iterator[None]:
        try:
            yield
        except EdkmExportError:
            raise
        except Exception as error:  # what the client raises has no common base
            raise InputError(f"{self.endpoint}: {self._words(error, revision)}") from error

    def _words(self, error: BaseException, revision: str | None) -> str:
        chain = list(_causes(error))
        if isinstance(error, ValueError) and FILE in str(
            error
        ):  # the client looks at the hub's opinion of it
            return f"refuses the model card ({' '.join(str(error).split())[:300]}); mend the head of {FILE}."
        for each in chain:
            if type(each).__name__ == "OfflineModeIsEnabled":
                return "HF_HUB_OFFLINE is set, so nothing is sent; unset it to push."
            status = getattr(getattr(each, "response", None), "status_code", None)
            if isinstance(status, int):
                return self._words_of_status(status, each, revision)
        for each in chain:
            if type(each).__module__.split(".")[0] in _TRANSPORTS or isinstance(
                each, ConnectionError | TimeoutError
            ):
                return f"cannot be reached ({_first_line(each)}); check the network, and HF_ENDPOINT if you set it."
        return f"did not answer as a hub does ({_first_line(error)}); check HF_ENDPOINT if you set it."

    def _words_of_status(self, status: int, error: BaseException, revision: str | None) -> str:
        said = getattr(error, "server_message", None)
        said = f", saying {' '.join(str(said).split())[:200]!r}" if said else ""
        answered = f"answers {status}{said}"
        if status == 401:
            return f"{answered}: it does not take your token; log in again with `hf auth login`, or mend HF_TOKEN."
        if status == 403:
            return (
                f"{answered}: your token may not write to {self.repo}; it needs write access, and you a role in "
                f"{self.repo.partition('/')[0]}."
            )
        if status == 404:
            branch = f" with the branch {revision}" if revision else ""
            return f"{answered}: it has no {self.repo}{branch}, or does not let you see it; check the name."
        if status == 429:
            return f"{answered}: too many requests; try again in some minutes."
        if status >= 500:
            return f"{answered}: the hub itself fails; nothing was committed, try again later."
        return f"{answered}; nothing was committed."


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """What the client warns of, such as fields of the model card, without file names and code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for each in caught:
        if issubclass(each.category, UserWarning):
            err.print(f"note: {' '.join(str(each.message).split())}", soft_wrap=True, markup=False)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Those of the client would be drawn over our own display."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__

"""edkm-export push: an exported folder goes to a hub, with its model card and report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edkm_export.cli.upload import Upload

__all__ = ["command"]


@click.command("push", short_help="Upload an exported model, with its card and report, to a hub.")
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("repo", metavar="REPO")
@click.option("--private", is_flag=True, help="Make the repository private, if it is new.")
@click.option(
    "--revision", "--branch", metavar="BRANCH", help="Branch, made if it is missing.  [default: main]"
)
@click.option("-m", "--message", help="Of the commit.  [default: Upload NAME with edkm-export VERSION]")
@click.option(
    "--unverified", is_flag=True, help="Push what has not passed verification; the card then says so."
)
@click.option("--dry-run", is_flag=True, help="Show what would go; no network and no token is needed.")
def command(
    folder: Path,
    repo: str,
    private: bool,
    revision: str | None,
    message: str | None,
    unverified: bool,
    dry_run: bool,
) -> None:
    """Upload OUT to REPO, `owner/name` on the Hugging Face hub or the hub of HF_ENDPOINT.

    OUT is the folder that `edkm-export coreml` or `edkm-export onnx` made. Its report must say PASS of these very
    files, by their sha256. All files arrive in one commit. You log in once with `hf auth login`, or set HF_TOKEN.
    """
    from edkm_export._version import __version__
    from edkm_export.activity import activity
    from edkm_export.cli.common_options import answering
    from edkm_export.cli.console import out
    from edkm_export.cli.hub_client import HubClient
    from edkm_export.cli.upload import Upload, size_words
    from edkm_export.errors import InputError
    from edkm_export.hub_id import hub_id_of_url, is_hub_id

    if not is_hub_id(repo):
        known = hub_id_of_url(repo)
        advice = (
            f"give {known}" if known else "give your name there or your organization's, a slash, and a name"
        )
        raise InputError(f"{repo!r}: expected OWNER/NAME; {advice}.")
    with activity(f"comparing {folder} with its report"):
        upload = Upload.of(folder, unverified=unverified)
    client = HubClient(repo)
    where = f"{client.address}" + (f", branch {revision}" if revision else "")
    if dry_run:
        kind = ", private if it is new" if private else ""
        with answering():
            out.print(f"would go to {where}{kind} (nothing was sent):", soft_wrap=True, markup=False)
            _print_files(upload)
        return
    client.log_in()
    count, size = len(upload.files), size_words(upload.size_bytes)
    name = upload.folder.absolute().name
    with activity(f"uploading {count} files, {size}, to {where}"):
        commit = client.send(
            upload,
            private=private,
            revision=revision,
            message=message or f"Upload {name} with edkm-export {__version__}",
        )
    told = f"{where}: {count} files, {size}, {upload.verdict}, commit {commit[:8]}"
    out.print(told, soft_wrap=True, markup=False)
    _note_license(upload)


def _print_files(upload: Upload) -> None:
    from edkm_export.cli.console import out
    from edkm_export.cli.upload import size_words

    lines = [f"{size_words(file.size_bytes):>10}  {file.name}" for file in upload.files]
    lines.append(f"{size_words(upload.size_bytes):>10}  in {len(upload.files)} files")
    lines.append("left out:" if upload.left_out else "left out: nothing")
    lines += [f"{'':10}  {name} ({reason})" for name, reason in upload.left_out.items()]
    for line in (*lines, f"verification: {upload.verdict}"):
        out.print(line, soft_wrap=True, markup=False)
    _note_license(upload)


def _note_license(upload: Upload) -> None:
    from edkm_export.cli.console import out
    from edkm_export.model_card import FILE

    if upload.license is None:
        words = (
            f"note: the card names no licence; write it as `license:` at the head of {upload.folder / FILE}"
        )
        out.print(words, soft_wrap=True, markup=False)

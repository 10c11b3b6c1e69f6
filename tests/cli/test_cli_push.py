"""`edkm-export push` against a hub of this test: what arrives, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from edkm_export.model_card import FormatCard, card_verdict, model_card
from tests.helpers.checkpoint_files import make_checkpoint
from tests.helpers.hub_stand_in import TOKEN, Hub, hub_stand_in
from tests.helpers.paths import ROOT

REPO = "some-one/small-model"
MODEL = ("config.json", "metadata.json", "onnx/model.onnx", "onnx/model.onnx_data")


@pytest.fixture(scope="module")
def hub_of_module() -> Iterator[Hub]:
    with hub_stand_in() as hub:
        yield hub


@pytest.fixture
def hub(hub_of_module, monkeypatch, tmp_path) -> Hub:
    """An empty hub, and a user who is logged in there."""
    hub = hub_of_module
    for held in (hub.private, hub.branches, hub.messages, hub.stored, hub.requests, hub.failing):
        held.clear()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture
def folder(work) -> Path:
    """A folder as `edkm-export onnx` leaves it, with files large and small."""
    folder = work / "model-onnx"
    (folder / "onnx").mkdir(parents=True)
    metadata = {"generator": "edkm-export 0", "model": "onnx/model.onnx"}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    (folder / "config.json").write_text("{}")
    (folder / "onnx/model.onnx").write_bytes(bytes(range(256)) * 50)
    (folder / "onnx/model.onnx_data").write_bytes(bytes(reversed(range(256))) * 300)
    form = FormatCard("onnx", ["onnx"], "An ONNX decoder")
    card = model_card(make_checkpoint(), "model", form, "PASS", "Verdict: **PASS**.")
    (folder / "README.md").write_text(card, encoding="utf-8")
    report(folder)
    return folder


def report(folder: Path, verdict: str = "PASS", **others: Any) -> None:
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in MODEL}
    content = {
        "faithful_export": verdict,
        "quality": "WITHIN",
        "artifact": folder.name,
        "provenance": {"verification": {"artifact": digests}},
        **others,
    }
    (folder / "report.json").write_text(json.dumps(content))
    (folder / "report.md").write_text("what was proved")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


# What arrives


def test_every_byte_arrives_in_one_commit(edkm, hub, folder):
    result = edkm("push", folder, REPO)
    assert result.status == 0, result.err
    assert hub.branches[REPO, "main"] == contents(folder)
    assert len(hub.messages) == 1 and hub.messages[0].startswith("Upload model-onnx with edkm-export ")
    assert not hub.private[REPO]
    large = set(map(len, hub.stored.values()))
    assert large == {12_800, 76_800}  # they took the way of large files
    assert "%" not in result.err  # the client's bars are not drawn over our display
    assert f"{hub.endpoint}/{REPO}: 7 files" in result.out and "PASS" in result.out


def test_hub_and_token_of_the_environment(hub, folder, tmp_path):
    """A process of its own, as a shell starts it."""
    variables = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "edkm_export", "push", folder, REPO],
        env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert hub.branches[REPO, "main"] == contents(folder)


def test_options(edkm, hub, folder):
    result = edkm("push", folder, REPO, "--private", "--branch", "four-bits", "--message", "first try")
    assert result.status == 0, result.err
    assert hub.private[REPO] and hub.messages == ["first try"]
    assert hub.branches[REPO, "main"] == {}
    assert hub.branches[REPO, "four-bits"] == contents(folder)


def test_again_into_what_is_there(edkm, hub, folder):
    """Large files that are there are not sent again; files of others stay."""
    hub.add(REPO)
    hub.branches[REPO, "main"]["NOTES"] = b"of someone"
    assert edkm("push", folder, REPO).status == 0
    hub.requests.clear()
    (folder / "config.json").write_text('{"changed": true}')
    report(folder)
    assert edkm("push", folder, REPO).status == 0
    assert not any(request.startswith("PUT") for request in hub.requests)
    assert hub.branches[REPO, "main"] == {**contents(folder), "NOTES": b"of someone"}


def test_what_does_not_belong_stays(edkm, hub, folder, work):
    (folder / ".DS_Store").write_text("x")
    (folder / ".cache" / "deep").mkdir(parents=True)
    (folder / ".cache" / "deep" / "file").write_text("x")
    (work / "secret").write_text("of the user")
    (folder / "link").symlink_to(work / "secret")
    kept = {name: content for name, content in contents(folder).items() if name[0] != "." and name != "link"}
    told = edkm("push", folder, REPO, "--dry-run").out
    assert ".DS_Store (hidden)" in told and ".cache (hidden)" in told and "link (a link)" in told
    assert "deep" not in told
    assert edkm("push", folder, REPO).status == 0
    assert hub.branches[REPO, "main"] == kept


def test_unverified_says_so_in_its_card(edkm, hub, folder):
    """What is on the hub says it; the folder is not touched."""
    for name in ("report.json", "report.md"):
        (folder / name).unlink()
    before = contents(folder)
    assert edkm("push", folder, REPO, "--unverified").status == 0
    sent = hub.branches[REPO, "main"]
    card = sent["README.md"].decode()
    assert (
        card_verdict(card) == "NOT VERIFIED" and "**NOT VERIFIED**: it holds no verification report." in card
    )
    assert "PASS" not in card and "An ONNX decoder" in card
    assert contents(folder) == before
    assert {**before, "README.md": sent["README.md"]} == sent


def test_card_of_a_folder_that_passed_later(edkm, hub, folder):
    path = folder / "README.md"
    path.write_text(path.read_text().replace("PASS", "NOT VERIFIED"))
    assert edkm("push", folder, REPO).status == 0
    assert "Faithful export: **PASS**" in hub.branches[REPO, "main"]["README.md"].decode()


def test_card_that_the_user_wrote(edkm, hub, folder):
    """It goes as it is, unless something has to be said."""
    (folder / "README.md").write_text("# mine\n")
    assert edkm("push", folder, REPO).status == 0
    assert hub.branches[REPO, "main"]["README.md"] == b"# mine\n"
    report(folder, "FAIL")
    assert edkm("push", folder, REPO, "--unverified").status == 0
    card = hub.branches[REPO, "main"]["README.md"].decode()
    assert card.startswith("# mine\n") and "the verdict of its report is FAIL" in card


def test_licence_is_asked_for(edkm, hub, folder):
    assert "the card names no licence" in edkm("push", folder, REPO).out
    path = folder / "README.md"
    path.write_text(path.read_text().replace("---\n", "---\nlicense: mit\n", 1))
    assert "licence" not in edkm("push", folder, REPO).out


# The dry run


def test_dry_run_needs_no_network_and_no_token(edkm, folder, monkeypatch):
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("the dry run opened a socket")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, forbidden)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    before = contents(folder)
    result = edkm("push", folder, REPO, "--dry-run")
    assert result.status == 0, result.err
    for name in before:
        assert re.search(rf"\d (B|kB)  {re.escape(name)}\n", result.out), name
    total = sum(map(len, before.values()))
    assert f"{total / 1e3:.1f} kB  in 7 files" in result.out and "nothing was sent" in result.out
    assert contents(folder) == before


def test_dry_run_of_what_would_be_refused(edkm, folder):
    report(folder, "FAIL")
    assert edkm("push", folder, REPO, "--dry-run").status == 2


# Refused: status 2, one sentence, nothing sent


def refused(edkm: Any, hub: Hub, *arguments: object) -> str:
    result = edkm("push", *arguments)
    assert result.status == 2, result.out
    assert hub.messages == [] and not any(hub.branches.values())
    return str(result.message)


@pytest.mark.parametrize(
    "repo", ["model", "a/b/c", "/b", "a/", "a b/c", "../x", "a/..", "-a/b", "a/b.", "a--b/c", "ä/b", ""]
)
def test_repository_name(edkm, hub, folder, repo):
    assert "expected OWNER/NAME" in refused(edkm, hub, folder, "--", repo)
    assert hub.requests == []


def test_repository_as_an_address(edkm, hub, folder):
    message = refused(edkm, hub, folder, "https://huggingface.co/some-one/small-model/tree/main")
    assert message.endswith("give some-one/small-model.")


@pytest.mark.parametrize("verdict", ["FAIL", "NOT RUN", "REPORTED", None, 1])
def test_verdict(edkm, hub, folder, verdict):
    report(folder, verdict)
    assert "--unverified" in refused(edkm, hub, folder, REPO)
    assert hub.requests == []


def test_two_verdicts(edkm, hub, folder):
    """A report tells faithful export and quality apart; the one must be proved, the other not beyond its limit."""
    path = folder / "report.json"
    content = json.loads(path.read_text())
    for faithful, quality, told in (
        ("FAIL", "WITHIN", "the verdict of its report is FAIL"),
        ("NOT RUN", "REPORTED", "the verdict of its report is NOT RUN"),
        ("PASS", "BEYOND", "the quality is beyond its limit"),
    ):
        path.write_text(json.dumps({**content, "faithful_export": faithful, "quality": quality}))
        assert told in refused(edkm, hub, folder, REPO)
    for quality in ("WITHIN", "REPORTED", "NOT RUN"):
        path.write_text(json.dumps({**content, "faithful_export": "PASS", "quality": quality}))
        assert edkm("push", folder, REPO).status == 0


def test_report_that_names_no_files(edkm, hub, folder):
    (folder / "report.json").write_text('{"verdict": "PASS"}')
    assert "does not say which files it is about" in refused(edkm, hub, folder, REPO)


@pytest.mark.parametrize("verdict", ["PASS", "FAIL"])
def test_report_of_a_version_with_one_verdict(edkm, hub, folder, verdict):
    report(folder)
    content = json.loads((folder / "report.json").read_text())
    del content["faithful_export"], content["quality"]
    (folder / "report.json").write_text(json.dumps({**content, "verdict": verdict}))
    assert edkm("push", folder, REPO).status == (0 if verdict == "PASS" else 2)


@pytest.mark.parametrize("content", [None, "", "[]", "{", '{"verdict": {}}'])
def test_report_that_is_missing_or_damaged(edkm, hub, folder, content):
    (folder / "report.json").unlink()
    if content is not None:
        (folder / "report.json").write_text(content)
    message = refused(edkm, hub, folder, REPO)
    assert f"edkm-export verify {folder} --report {folder}" in message and "--unverified" in message


@pytest.mark.parametrize("change", ["changed", "missing", "linked"])
def test_files_that_the_report_is_not_about(edkm, hub, folder, work, change):
    path = folder / "onnx" / "model.onnx_data"
    if change == "linked":
        shutil.move(path, work / "elsewhere")
        path.symlink_to(work / "elsewhere")
    elif change == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
    message = refused(edkm, hub, folder, REPO)
    assert "onnx/model.onnx_data is not the file that its report is about" in message


def test_no_card(edkm, hub, folder):
    (folder / "README.md").unlink()
    assert "holds no model card (README.md)" in refused(edkm, hub, folder, REPO)


def test_what_is_no_exported_folder(edkm, hub, work, saved):
    (work / "run").mkdir()
    shutil.copy(saved, work / "run" / "model.pt")
    assert "gone: no such folder" in refused(edkm, hub, "gone", REPO)
    assert f"edkm-export coreml {saved}" in refused(edkm, hub, saved, REPO)
    assert "run: holds a checkpoint" in refused(edkm, hub, "run", REPO)
    (work / "other").mkdir()
    assert "is no folder that `edkm-export coreml`" in refused(edkm, hub, "other", REPO)


def test_no_token(edkm, hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    message = refused(edkm, hub, folder, REPO)
    assert message.startswith(f"{hub.endpoint}: not logged in") and "hf auth login" in message
    assert hub.requests == []


def test_token_that_is_not_taken(edkm, hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    message = refused(edkm, hub, folder, REPO)
    assert message.startswith(f"{hub.endpoint}: answers 401") and "hf auth login" in message
    assert "hf_of_another" not in message


@pytest.mark.parametrize(
    ("where", "status", "says", "told"),
    [
        ("/api/repos/create", 403, "not your organization", "answers 403, saying 'not your organization'"),
        ("/api/repos/create", 403, "", "needs write access"),
        ("/api/repos/create", 404, "", "check the name"),
        ("/api/repos/create", 503, "", "the hub itself fails"),
        ("/api/repos/create", 418, "", "answers 418; nothing was committed"),
        ("/api/models", 403, "", "may not write to some-one/small-model"),
        ("/some-one", 403, "quota exceeded", "saying 'quota exceeded'"),
        ("/store", 403, "", "answers 403"),
        (f"/api/models/{REPO}/commit", 500, "", "the hub itself fails"),
    ],
)
def test_hub_that_refuses(edkm, hub, folder, where, status, says, told):
    """At each step of an upload: the endpoint is named, and nothing is committed."""
    hub.failing[where] = (status, says)
    message = refused(edkm, hub, folder, REPO)
    assert message.startswith(f"{hub.endpoint}: ") and told in message, message
    assert TOKEN not in message


def test_hub_that_is_not_there(edkm, hub, folder, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    message = refused(edkm, hub, folder, REPO)
    assert message.startswith(f"{endpoint}: cannot be reached")


def test_what_is_no_hub(edkm, hub, folder):
    hub.failing["/api/repos/create"] = (200, "")
    assert refused(edkm, hub, folder, REPO).startswith(f"{hub.endpoint}: did not answer as a hub does")


def test_offline_mode(edkm, hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(edkm, hub, folder, REPO)


def test_private_is_not_forgotten(edkm, hub, folder):
    """A public repository that is there would show what was meant to be hidden."""
    hub.add(REPO)
    assert "is there already, and public" in refused(edkm, hub, folder, REPO, "--private")
    hub.private[REPO] = True
    assert edkm("push", folder, REPO, "--private").status == 0


def test_card_that_the_hub_refuses(edkm, hub, folder):
    hub.failing["/api/validate-yaml"] = (400, "license is unknown")
    message = refused(edkm, hub, folder, REPO)
    assert "refuses the model card" in message and "license is unknown" in message

"""Models of the hub, from a stand-in for it: no test depends on the network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edkm_export.errors import InputError
from edkm_export.hub_id import is_hub_id
from edkm_export.reference import hub as hub_module
from edkm_export.reference.source import (
    Source,
    account,
    embedding_settings,
    load_config,
    load_embedding_model,
)
from tests.helpers.embedding_models import CASES, write_folder
from tests.helpers.hub import Hub, running_hub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """The stand-in, in place of the hub."""
    from huggingface_hub import constants

    with running_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        hub_module.commit_of.cache_clear()
        yield running
        hub_module.commit_of.cache_clear()


@pytest.fixture
def uploaded(small_folder, tmp_path) -> Path:
    """A copy of a model that a test may change."""
    return Path(shutil.copytree(small_folder, tmp_path / "uploaded"))


def asked(hub: Hub) -> list[str]:
    """What was asked of a model; the hub's library asks for more on its own."""
    return [path for path in hub.requests if "agent" not in path]


def test_account_of_a_hub_model(hub, uploaded):
    """The same as of the folder that was uploaded; a pickle beside it is not fetched."""
    (uploaded / "pytorch_model.bin").write_bytes(b"a pickle")
    hub.models["someone/small"] = uploaded
    found = account(Source.parse("someone/small").locate())
    expected = account(Source.parse(str(uploaded)))
    assert found.tensors == expected.tensors and found.settings == expected.settings
    assert not found.not_understood
    assert not any("pytorch_model" in path for path in hub.requests)
    assert sum(path == "/api/models/someone/small" for path in hub.requests) == 1

    # what was fetched is used when the hub is not there
    hub_module.commit_of.cache_clear()
    hub.failures["someone/small"] = (503, "")
    hub.requests.clear()
    assert account(Source.parse("someone/small").locate()) == found
    assert asked(hub) == ["/api/models/someone/small"]


def test_embedding_model(hub, tmp_path):
    """The folders of its modules are fetched, those of other formats are not."""
    folder = write_folder(CASES["dense tanh"], tmp_path / "uploaded")
    (folder / "onnx").mkdir()
    (folder / "onnx/config.json").write_text("{}")
    hub.models["someone/embeddings"] = folder
    source = Source.parse("someone/embeddings").locate()
    assert embedding_settings(source) == embedding_settings(Source.parse(folder))
    found = load_embedding_model(source)
    assert found.dense[1].weight.equal(load_embedding_model(Source.parse(folder)).dense[1].weight)
    assert not any("onnx/" in path for path in hub.requests)


def test_command_line_asks_once(hub, tmp_path):
    """In a process of its own: the message is one line, status 2, and no model is waited for."""
    settings = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "edkm_export", "palettize", "nobody/nothing"],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"edkm-export: nobody/nothing: no such folder here, and the hub {hub.address} has no such model; check the "
        "name, or log in with `hf auth login` if it is private.\n"
    )
    assert asked(hub) == ["/api/models/nobody/nothing"]


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (404, "RepoNotFound", "has no such model"),
        (401, "", "has no such model"),
        (403, "GatedRepo", "wants its terms accepted first"),
        (503, "", "cannot be reached (status 503)"),
    ],
)
def test_hub_is_asked_once(hub, status, code, said):
    hub.failures["nobody/nothing"] = (status, code)
    with pytest.raises(InputError) as caught:
        Source.parse("nobody/nothing").locate()
    message = str(caught.value)
    assert message.startswith("nobody/nothing: ") and said in message and hub.address in message
    assert asked(hub) == ["/api/models/nobody/nothing"]


def test_hub_that_is_not_there(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        InputError, match=r"no such folder here, and the hub http://127.0.0.1:9 cannot be reached"
    ):
        Source.parse("nobody/nothing").locate()


def test_adapter_on_the_hub_is_not_left_out(hub, uploaded):
    """Its weights are not fetched, so the model would be read without it."""
    (uploaded / "adapter_config.json").write_text("{}")
    hub.models["someone/adapted"] = uploaded
    with pytest.raises(InputError, match="someone/adapted: holds a LoRA adapter"):
        load_config(Source.parse("someone/adapted"))


def test_download_that_breaks_off(hub, uploaded):
    hub.models["someone/broken"] = uploaded
    Source.parse("someone/broken").locate()
    hub.failures["someone/broken"] = (404, "EntryNotFound")
    with pytest.raises(InputError, match=r"someone/broken: cannot be fetched from the hub http://127"):
        hub_module.fetch("someone/broken")


@pytest.mark.parametrize(
    "name",
    ["nope", "a/b/c", "models/x.gguf", "a/x.safetensors", "./a/b", "../a", "a/", "/a", "-a/b", "a/model.pt"],
)
def test_what_is_no_hub_id_is_a_missing_path(hub, name):
    assert not is_hub_id(name)
    with pytest.raises(InputError, match="no such file or folder"):
        Source.parse(name)
    assert asked(hub) == []

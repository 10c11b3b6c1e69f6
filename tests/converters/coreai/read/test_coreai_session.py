"""Apple's runtime in its own process: what it computes, what is refused before it is called, what a death says."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from converters.coreai.backend import missing_backend
from edkm_export.artifact.metrics import divergence
from edkm_export.artifact.protocol import DamagedArtifact
from edkm_export.errors import BackendMissingError, InputError, PackageError
from edkm_export.reference.hard_model import load_hard_model
from tests.helpers.paths import FIXTURES

if missing_backend():
    pytest.skip(f"not run: {missing_backend()}", allow_module_level=True)

from converters.coreai.read import rewriting
from converters.coreai.read.artifact import open_artifact
from converters.coreai.read.asset import load_asset
from converters.coreai.read.running import RunningModel
from converters.coreai.read.runtime import AppleRuntime
from converters.coreai.read.session import CoreAISession, new_session

FOLDER = FIXTURES / "coreai"


@pytest.fixture(scope="module")
def text():
    return torch.randint(320, (50,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected(coreai_checkpoint, text):
    """Logits of transformers' own model with the decoded weights."""
    with torch.no_grad():
        return load_hard_model(coreai_checkpoint)(text[None]).logits[0]


@pytest.fixture
def session(coreai_model):
    return CoreAISession(coreai_model)


def test_the_twin_computes_what_pytorch_does(session, text, expected):
    """Random weights of the size of trained ones; float16 after each operation costs about 1e-5 nats."""
    found = divergence([(expected, session.feed(text))])
    assert found.kl_mean < 1e-4 and found.settled_agreement >= 0.98


def test_the_file_itself_computes_it_too(coreai_model, text, expected):
    """Sums of 48 products in float16 lose little."""
    found = divergence([(expected[:6], CoreAISession(coreai_model, exact=True).feed(text[:6]))])
    assert found.kl_mean < 1e-3


def test_pieces_of_a_text_give_the_bits_of_the_whole(session, text):
    whole = session.feed(text)
    session.reset()
    pieces = torch.cat([session.feed(piece) for piece in text.split([1, 1, 30, 2, 16])])
    assert torch.equal(whole, pieces)


def test_a_cache_that_grows_keeps_what_it_holds(coreai_model, text, monkeypatch):
    session = CoreAISession(coreai_model)
    whole = session.feed(text)
    monkeypatch.setattr("converters.coreai.read.session._FIRST_LENGTH", 4)
    session.reset()
    assert torch.equal(whole, torch.cat([session.feed(piece) for piece in text.split(7)]))


def test_the_runtime_decodes_every_form_of_palette_to_the_same_bits(coreai_model, coreai_checkpoint):
    found = dict(coreai_model.decoded())
    assert found.keys() == coreai_checkpoint.palettized.keys()
    for name, tensor in coreai_checkpoint.palettized.items():
        assert torch.equal(found[name].view(torch.int16), tensor.decode().view(torch.int16)), name


@pytest.mark.parametrize("token", [-1, 320, 1 << 40])
def test_tokens_outside_the_vocabulary(session, token):
    with pytest.raises(InputError, match=f"token {token} is outside its vocabulary of 320"):
        session.feed(torch.tensor([1, token]))


def test_more_tokens_than_positions(session):
    session.feed(torch.ones(60, dtype=torch.long))
    with pytest.raises(InputError, match="60 are taken, 5 more do not fit"):
        session.feed(torch.ones(5, dtype=torch.long))


ONE = np.ones((1, 1), np.int32)


@pytest.mark.parametrize(
    ("function", "inputs", "states", "message"),
    [
        ("other", {}, {}, "has no function 'other'; it has main"),
        ("main", {"input_ids": ONE}, {}, "input 'position_ids' is missing"),
        ("main", {"input_ids": ONE, "position_ids": ONE, "more": ONE}, {}, "input 'more' is unknown"),
        ("main", {"input_ids": ONE, "position_ids": ONE}, {}, "state 'keyCache' is missing"),
        ("main", {"input_ids": ONE[0], "position_ids": ONE}, None, "is int32 [1], expected int32 [1, ?]"),
        (
            "main",
            {"input_ids": ONE[:, :0], "position_ids": ONE},
            None,
            "is int32 [1, 0], expected int32 [1, ?]",
        ),
        ("main", {"input_ids": ONE.astype(np.int64), "position_ids": ONE}, None, "is int64 [1, 1]"),
    ],
)
def test_wrong_calls_are_refused_before_they_are_made(coreai_model, function, inputs, states, message):
    known = {"keyCache": "keyCache", "valueCache": "valueCache"}
    with pytest.raises(InputError) as caught:
        coreai_model.exact.call(function, inputs, states=known if states is None else states)
    assert message in str(caught.value)


def test_a_process_that_dies_is_an_error_of_the_file(text):
    model = RunningModel(load_asset(FOLDER / "model.aimodel"))
    session = CoreAISession(model, exact=True)
    os.kill(model.exact.pid, signal.SIGKILL)
    with pytest.raises(PackageError, match="ended with signal 9"):
        session.feed(text)


def test_a_deadline_ends_what_takes_too_long(text):
    model = RunningModel(load_asset(FOLDER / "model.aimodel"), deadline_s=0.0)
    with pytest.raises(PackageError, match="gave no answer within 0 s and was ended"):
        CoreAISession(model)


def test_a_program_that_the_runtime_cannot_load(tmp_path):
    """The hash is right and our reader finds nothing wrong: an operation has the operands of another form."""
    asset = Path(shutil.copytree(FOLDER / "model.aimodel", tmp_path / "model.aimodel"))
    raw = (asset / "main.mlirb").read_bytes()
    assert b"primitive.rsqrt_v1" in raw
    (asset / "main.mlirb").write_bytes(raw.replace(b"primitive.rsqrt_v1", b"primitive.rsqrt_v9"))
    (asset / "main.hash").write_bytes(hashlib.sha256((asset / "main.mlirb").read_bytes()).digest())
    artifact = open_artifact(asset)
    assert not isinstance(artifact, DamagedArtifact)
    with pytest.raises(PackageError, match="Apple's Core AI runtime"):
        artifact.executions[0].execute(torch.tensor([1, 2]))


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch, text):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = RunningModel(load_asset(FOLDER / "model.aimodel"))
    CoreAISession(model).feed(text[:2])
    assert list(tmp_path.iterdir())
    model.close()
    assert not list(tmp_path.iterdir())


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(
        "converters.coreai.read.runtime.missing_backend", lambda: "Core AI is not installed: pip"
    )
    with pytest.raises(BackendMissingError, match="pip"):
        CoreAISession(RunningModel(load_asset(FOLDER / "model.aimodel")))


def test_the_static_engine(text, expected, coreai_checkpoint):
    """Its calls begin at multiples of their length, so that tokens are fed again; nothing of that shows."""
    session = new_session(RunningModel(load_asset(FOLDER / "static.aimodel")))
    whole = session.feed(text)
    found = divergence([(expected, whole)])
    assert found.kl_mean < 1e-4 and found.settled_agreement >= 0.98
    session.reset()
    assert torch.equal(whole, torch.cat([session.feed(piece) for piece in text.split([1, 1, 30, 2, 16])]))


@pytest.mark.parametrize("name", ["model", "static"])
def test_weights_in_blocks_give_the_same_bits(name, text, tmp_path, monkeypatch):
    """Only large weights are held so, which these models have none of."""
    model = RunningModel(load_asset(FOLDER / f"{name}.aimodel"))
    whole = new_session(model).feed(text)
    split: list[tuple[int, ...]] = []
    product = rewriting._product_in_blocks
    monkeypatch.setattr(rewriting, "_LARGE_BYTES", 0)
    monkeypatch.setattr(
        rewriting, "_product_in_blocks", lambda *given: split.append(given[3]) or product(*given)
    )
    twin = tmp_path / "twin.aimodel"
    rewriting.write_twin(model.asset.path, twin)
    assert any(shape[-1] == 320 for shape in split)
    runtime = AppleRuntime(twin, model.asset.program.public, "twin")
    assert torch.equal(whole, new_session(model, runtime=runtime).feed(text))


def test_prompt_opt_fills_the_cache_as_extend_does(text):
    """`prompt_opt` gives no logits; those of the next call show what it left."""
    model = RunningModel(load_asset(FOLDER / "static.aimodel"))
    session = new_session(model, exact=True)  # the twin has no `prompt_opt`
    session.feed(text[:16])
    after = session.feed(text[16:20])
    session.reset()
    session.step = "prompt_opt"
    session.feed(text[:16])
    session.step = "extend"
    assert torch.equal(after, session.feed(text[16:20]))

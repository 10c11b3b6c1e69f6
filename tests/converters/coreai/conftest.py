"""Apple's runtime on the models of `fixtures/coreai`; to be read only."""

from __future__ import annotations

import pytest

from edkm_export import checkpoint
from tests.helpers.paths import FIXTURES


@pytest.fixture(scope="session")
def coreai_checkpoint():
    return checkpoint.load(FIXTURES / "coreai" / "model.pt")


@pytest.fixture(scope="session")
def coreai_model():
    """The dynamic engine's model, with processes that run it."""
    pytest.importorskip("coreai", reason="needs coreai-core: pip install 'edkm-export[coreai]'")
    from converters.coreai.read.asset import load_asset
    from converters.coreai.read.running import RunningModel

    return RunningModel(load_asset(FIXTURES / "coreai" / "model.aimodel"))

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch as th

from agents.models.causal import CausalBackbone
from tests.agents.decoding.caches import made


@pytest.fixture(params=["gpt2", "llama"])
def backbone(request: pytest.FixtureRequest) -> Iterator[CausalBackbone]:
    with th.no_grad():
        backbone = made(request.param)
        # What is compared would else be the same twice.
        assert backbone.capabilities.caches is None
        yield backbone

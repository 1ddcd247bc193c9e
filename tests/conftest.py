"""What all tests share: one thread, repeatable examples, and the real data where there is some."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real weights and photographs."""
    folder = os.environ.get("ATTRIB_ZOO_DATA")
    if not folder:
        pytest.skip("ATTRIB_ZOO_DATA is not set: no real weights and photographs")
    return Path(folder)

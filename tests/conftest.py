"""Shared fixtures: where real test data lies, and what is skipped when it does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real tokenizers, models and texts; tests that need it skip where it is absent."""
    root = Path(os.environ.get("EDGEKIT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / "README.md").is_file():
        pytest.skip(f"no test data at {root} (set EDGEKIT_TEST_DATA)")
    return root

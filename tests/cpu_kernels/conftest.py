"""What tests of kernels share."""

import pytest

import rapydli_flow.config
from cpu_kernels import compile as compiler


@pytest.fixture
def cache_dir(tmp_path, monkeypatch):
    """An empty cache for this process."""
    monkeypatch.setenv("RAPYDLI_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "_kernels", {})
    rapydli_flow.config.settings.cache_clear()
    yield tmp_path
    rapydli_flow.config.settings.cache_clear()

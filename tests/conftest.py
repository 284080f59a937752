"""Long tests run only where they are asked for by name: ``pytest -m exhaustive``, ``pytest -m papers``."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [mark for mark in ("exhaustive", "papers") if mark not in config.getoption("markexpr")]
    dropped = [item for item in items if any(item.get_closest_marker(mark) for mark in left_out)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]

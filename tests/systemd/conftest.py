"""Boots with systemd as PID 1."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "/tests/systemd/test_boot" in str(item.path):
            item.add_marker(pytest.mark.root)

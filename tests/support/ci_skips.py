"""In CI a skipped test is a failure, unless its reason is on the list below.

A test that skips where a tool is missing passes for green while nothing is tested. CI (the variable CI=true) has every
tool, as set-up installs them, so there a skip means that a step is missing from set-up. tests/conftest.py registers it.
"""

from __future__ import annotations

import os
import re

import pytest

ALLOWED: dict[str, str] = {
    # regular expression that the whole reason must match: why CI can't have it
    r"this clone has no commit (.|\n)*": "an earlier version is taken from the history, which a shallow clone has not",
}

_reasons: list[tuple[str, str]] = []


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def unexpected(skipped: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Of pairs of test and reason, those whose reason is not allowed."""
    return [(test, reason) for test, reason in skipped if not any(re.fullmatch(known, reason) for known in ALLOWED)]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        _reasons.append((report.nodeid, _reason(report)))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _reasons.append((report.nodeid, _reason(report)))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get("CI") == "true" and unexpected(_reasons) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    bad = unexpected(_reasons)
    if os.environ.get("CI") == "true" and bad:
        terminalreporter.section("skipped in CI, where nothing may be", red=True)
        for test, reason in bad:
            terminalreporter.line(f"{test}: {reason}")

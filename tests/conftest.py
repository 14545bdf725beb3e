"""How the tests run: one thread a process, no deadlines; and a last word on what was skipped."""

import os
from collections.abc import Generator

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
settings.register_profile("tests", deadline=None)  # other processes use the cores too
settings.load_profile("tests")


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter,
) -> Generator[None, object, object]:
    """After pytest's own list of what was skipped and why: say so where it has nothing to list."""
    result = yield
    if "passed" in terminalreporter.stats and "skipped" not in terminalreporter.stats:
        terminalreporter.write_line("No test was skipped.")
    return result

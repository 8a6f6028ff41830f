"""In which of the processes that tests start it is measured what lines they reach.

Coverage would measure in all of them, which makes each start half as long again and each request
twice as long. What a service does under load is by luck, besides: a line that only that reaches is
missed now and then. So it is measured where a test asks for it, and tests reach the rest.
"""

from __future__ import annotations

import os

COVERAGE = "COVERAGE_PROCESS_CONFIG"  # what coverage's own file in site-packages looks for
MEASURING: dict[str, str] = {}
"""The environment of a process that is to be measured; empty where nothing is."""


def measure_no_children() -> None:
    """Have processes that are started from now on not measured, unless they are told MEASURING."""
    MEASURING.update({name: os.environ.pop(name) for name in [COVERAGE] if name in os.environ})

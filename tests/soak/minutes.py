"""How long the parts of the soak last that have no end by themselves."""

from __future__ import annotations

import os

MINUTES = float(os.environ.get("SOAK_MINUTES", "2"))

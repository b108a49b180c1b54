"""The weights of a rival: none."""

from __future__ import annotations

from balora_plugin.config import TERMS

NO_TERMS = {f"lambda_{name}": 0.0 for name in TERMS}

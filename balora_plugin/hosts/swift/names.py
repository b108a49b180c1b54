"""The names that ms-swift and this package share; imports nothing."""

from __future__ import annotations

from pathlib import Path

TUNER = "ba_lora"
VARIABLE = "BA_LORA"
PLUGIN_FILE = Path(__file__).parent / "plugin" / "balora_swift_plugin.py"
TASKS = ("causal_lm", "seq_cls")  # of `task_type`, those that are trained here

"""The names of the files of a saved adapter and of a checkpoint."""

from __future__ import annotations

PROBE_FILE = "ba_lora_probe.safetensors"
HEAD_FILE = "ba_lora_head.safetensors"
FORMAT_VERSION = 1
SETTINGS_FILE = "ba_lora.json"
INIT_FILE = "ba_lora_init.safetensors"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
STATE_FILE = "trainer_state.json"  # the last file of a Trainer's checkpoint

"""The names of the files of a saved adapter and of a checkpoint."""

from __future__ import annotations

PROBE_FILE = "ba_lora_probe.safetensors"
HEAD_FILE = "ba_lora_head.safetensors"
FORMAT_VERSION = 1
SETTINGS_FILE = "ba_lora.json"
INIT_FILE = "ba_lora_init.safetensors"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
STATE_FILE = "trainer_state.json"  # the last file that a Trainer itself writes
COST_FILE = "ba_lora_cost.json"  # of a run: what it was and what it cost
MANIFEST_FILE = "ba_lora_checkpoint.json"  # of a checkpoint: written after all others
OPTIMIZER_FILE = "optimizer.pt"
SCHEDULER_FILE = "scheduler.pt"
SCALER_FILE = "scaler.pt"
LOCK_FILE = "_ba_lora_run.lock"  # of an output directory; hosts push no file whose name begins with _

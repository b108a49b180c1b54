"""The files of a saved adapter and of a checkpoint: their names, ba_lora.json, what is whole. No tensors, no PEFT."""

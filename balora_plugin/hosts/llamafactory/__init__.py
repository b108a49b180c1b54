"""LLaMA-Factory as it is: its own YAML with a `ba_lora:` block, trained by its own run function.

0.9.5 has no place for a plug-in: `balora llamafactory train` puts ours in that of three of its globals (`hooks.py`).
"""

"""ms-swift: `tuner_type: ba_lora` by its own `--external_plugins`, with the settings in the variable BA_LORA."""

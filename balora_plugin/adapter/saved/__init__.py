"""An adapter written as a stock LoRA with side files, and read back exactly."""

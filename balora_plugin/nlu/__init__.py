"""The NLU family: BA-LoRA for sequence classification and regression."""

"""A real offline study: a pre-trained encoder learns to tell the standard library's module families by LoRA's kin."""

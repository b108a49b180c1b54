"""A five-minute comparison of LoRA, PiSSA and BA-LoRA on a model pre-trained on the spot; needs no downloads."""

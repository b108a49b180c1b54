"""What is read of the pre-trained model: heads, attention, quantised layers, identity, itself with adapters off."""

"""Checkpoints: reading tensors one at a time, children out of a nested checkpoint, safetensors and Hugging Face."""

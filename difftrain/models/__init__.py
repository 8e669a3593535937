"""Networks, autoencoders, text encoders, conditioning, adapters and LoRA files."""

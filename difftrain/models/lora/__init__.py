"""LoRA layers in networks, and their files."""

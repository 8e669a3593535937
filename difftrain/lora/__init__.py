"""LoRA files: written for diffusers and under kohya's names (files, keys), and put into models (models)."""

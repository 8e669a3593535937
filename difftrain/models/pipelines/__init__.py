"""Pretrained text-to-image pipelines of diffusers as models; one family is one file."""

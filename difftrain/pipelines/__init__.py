"""Pretrained text-to-image pipelines of diffusers, as models to fine-tune.

pretrained: their files. text: prompts to states. families: what tells one kind of pipeline from another. text_to_image: the models that
recipes name. text_conditioning: prompts as conditioning in training and sampling.
"""

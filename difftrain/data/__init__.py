"""Where images and clips come from: importing this package registers the data sets.

items: what a data set yields. originals: what is known of an image before it is decoded. transform: one image to uint8 pixels.
buckets: sizes for images of several aspect ratios. loader: the micro-batches of each step.
"""

from difftrain.data import digit_clips, digits, huggingface, image_folder, mixed, video

__all__ = ["digit_clips", "digits", "huggingface", "image_folder", "mixed", "video"]

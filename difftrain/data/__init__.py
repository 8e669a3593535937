"""Where images and clips come from: importing this package registers the data sets.

items: what a data set yields. transform: one image to uint8 pixels. loader: the micro-batches of each step.
"""

from difftrain.data import digit_clips, digits, huggingface, image_folder, video

__all__ = ["digit_clips", "digits", "huggingface", "image_folder", "video"]

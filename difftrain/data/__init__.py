"""Where images and clips come from, and the micro-batches of each step."""

"""From a recipe to built parts: one builder a wing, each with its checks beside it."""

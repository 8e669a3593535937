"""From a trained network to pictures."""

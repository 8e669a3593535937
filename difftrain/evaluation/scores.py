"""Which way each score is better: the one place that knows, for picking checkpoints and for showing scores. Imports nothing."""

LOWER, HIGHER = "lower", "higher"

BETTER = {
    "frechet_distance": LOWER,
    "kernel_distance": LOWER,
    "precision": HIGHER,
    "recall": HIGHER,
    "class_agreement": HIGHER,
    "nearest_neighbour_ratio": HIGHER,
}

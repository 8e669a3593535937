"""Which way each score is better: the one place that knows, for picking checkpoints and for showing scores. Imports nothing."""

LOWER, HIGHER, NEAR_ONE = "lower", "higher", "near 1"

BETTER = {
    "frechet_distance": LOWER,
    "kernel_distance": LOWER,
    "precision": HIGHER,
    "recall": HIGHER,
    "class_agreement": HIGHER,
    "nearest_neighbour_ratio": NEAR_ONE,  # far below: copies of the training set
}


def badness(score: str, value: float) -> float:
    """The value turned so that smaller is better; a score that is not listed is taken as it is."""
    return {LOWER: value, HIGHER: -value, NEAR_ONE: abs(value - 1)}[BETTER.get(score, LOWER)]

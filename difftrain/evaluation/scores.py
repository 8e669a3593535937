"""Which way each score is better: the one place that knows, for picking checkpoints and for showing scores. Imports nothing."""

LOWER, HIGHER, NEAR_ONE = "lower", "higher", "near 1"

BETTER = {
    "frechet_distance": LOWER,
    "frechet_distance_infinity": LOWER,
    "fid": LOWER,
    "fid_infinity": LOWER,
    "sfid": LOWER,
    "sfid_infinity": LOWER,
    "kernel_distance": LOWER,
    "kid": LOWER,
    "gaussian_mmd": LOWER,
    "cmmd": LOWER,
    "precision": HIGHER,
    "recall": HIGHER,
    "density": HIGHER,  # about 1 for real images, more where generated ones crowd together
    "coverage": HIGHER,
    "classifier_score": HIGHER,
    "inception_score": HIGHER,
    "clip_score": HIGHER,
    "class_agreement": HIGHER,
    "nearest_neighbour_ratio": NEAR_ONE,  # far below: copies of the training set
}


def badness(score: str, value: float) -> float:
    """The value turned so that smaller is better; a score that is not listed is taken as it is."""
    return {LOWER: value, HIGHER: -value, NEAR_ONE: abs(value - 1)}[BETTER.get(score, LOWER)]

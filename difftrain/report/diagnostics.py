"""Charts of the results in RUN/diagnostics.json, with noise to the left as everywhere.

A band is two standard errors wide to either side, and ± is one.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from difftrain.report.charts import Band, Curves
from difftrain.report.page import Card
from difftrain.report.style import Level
from difftrain.report.text import number, numbers

Result = Mapping[str, Any]
LOG_SNR, TIMESTEP = "log-SNR (noise ←)", "timestep (noise →)"


def cards_of(results: Mapping[str, Result]) -> list[Card]:
    """Return the charts of all diagnostics in order.

    Args:
        results: The content of diagnostics.json: results by the name of the diagnostic.

    Returns:
        The charts. A diagnostic without curves has none.
    """
    cards: list[Card] = []
    for name, draw in DRAWN.items():
        if name in results:
            cards += draw(results[name])
    return cards


def denoising_error(result: Result) -> list[Card]:
    """Return the error of x0 by noise level, and the gap between held-out and training images."""
    x = result["log_snr"]
    curves = {}
    for name, key in {"held-out": "held_out", "training": "training"}.items():
        if key in result:
            curves[name] = points(x, result[key]["x0_error"])
    caption = (
        "Mean squared error per pixel of the network's estimate of the clean image. The mean "
        f"held-out loss is {with_error(result)}."
    )
    error = result.get("held_out_standard_error", {}).get("x0_error")
    band = band_of(x, result["held_out"]["x0_error"], error)
    chart = Curves("Error of x0 over log-SNR", curves, LOG_SNR, band=band)
    cards = [Card("Error of x0 by noise level", chart, caption)]
    if "gap" in result:
        cards.append(gap_card(result))
    return cards


def gap_card(result: Result) -> Card:
    """Return the gap between the losses on held-out and on training images."""
    x, gap = points(result["log_snr"], result["gap"]["loss"])
    chart = Curves(
        "Held-out minus training loss over log-SNR",
        {"gap": (x, gap)},
        LOG_SNR,
        level=Level("", 0.0),
        band=band_of(x, gap, result["gap_standard_error"]["loss"]),
    )
    caption = (
        "Loss on held-out images minus loss on training images, with a band of two standard "
        "errors. At the noise end the gap shows how the two sets differ. A larger gap at less "
        "noise means that the network memorizes its training images."
    )
    return Card("Held-out gap", chart, caption)


def prediction_error(result: Result) -> list[Card]:
    """Return the spread of the prediction error, and whether it is Gaussian."""
    t = result["t"]
    spread = Curves(
        "Spread of the prediction error over t",
        {"nu": points(t, result["nu"])},
        TIMESTEP,
        band=band_of(t, result["nu"], result.get("nu_standard_error")),
    )
    rejected = Curves(
        "Fraction of pixels with errors that are not Gaussian",
        {"rejected": points(t, result["rejected"])},
        TIMESTEP,
        level=Level("of Gaussian errors", number(result["nominal_rejected"])),
    )
    mean = with_error(result)
    return [
        Card(
            "Spread of the prediction error",
            spread,
            f"Standard deviation of the error of x0, mean over pixels. Its mean over t is {mean}.",
        ),
        Card(
            "Is the prediction error Gaussian?",
            rejected,
            "Fraction of pixels whose errors fail a Shapiro-Wilk test at 5 %.",
        ),
    ]


def exposure_bias(result: Result) -> list[Card]:
    """Return the exposure bias, the norm of the predicted noise, and the drift without noise."""
    t, norms, drift = result["t"], result["eps_norm"], result["drift"]
    deltas = {}
    for name, key in {"chain": "consecutive", "one step": "one_step"}.items():
        deltas[name] = points(t, result[key]["delta"])
        deltas[f"{name}, floor"] = points(t, result[key]["floor"])
    delta = Curves("Exposure bias over t", deltas, TIMESTEP, log=False)
    gap = Curves(
        "Gap of the norm of the predicted noise",
        {"gap": points(norms["t"], norms["gap"])},
        TIMESTEP,
        level=Level("", 0.0),
    )
    error = Curves(
        "Drift over the number of steps",
        {"error": points(drift["steps"], drift["error"])},
        "reverse steps n",
    )
    return [
        Card(
            "Exposure bias",
            delta,
            "Excess spread of sampled x_t around the scaled image. The reverse process forgets its "
            "image, so a perfect model does not score 0: the floor is its score on Gaussian data "
            f"with the same variances. The mean over t of the chain is {with_error(result)}, that "
            f"of its floor {short(result.get('floor'))}.",
        ),
        Card(
            "Norm of the predicted noise",
            gap,
            "Mean norm along sampling minus the mean norm at noised images.",
        ),
        Card(
            "Drift without noise",
            error,
            "Mean absolute error of the image after the last n reverse steps by posterior means.",
        ),
    ]


def cumulative_error(result: Result) -> list[Card]:
    """Return the MMD between reverse processes stopped at t and noised held-out images."""
    curves = {"model": points(result["t"], result["u"])}
    if "training" in result:
        curves["training images"] = points(result["t"], result["training"])
    band = band_of(result["t"], result["u"], result.get("u_standard_error"))
    chart = Curves("MMD over t", curves, TIMESTEP, level=Level("perfect", 0.0), band=band)
    caption = (
        "Unbiased MMD² between reverse processes stopped at t and noised held-out images. "
        f"A perfect model is at 0, up to noise. The mean over t is {with_error(result)}."
    )
    return [Card("Cumulative error", chart, caption)]


def smoothness(result: Result) -> list[Card]:
    """Return the distances of adjacent images along an interpolation between two noises."""
    positions = numbers(result["position"])
    middles = [(a + b) / 2 for a, b in pairwise(positions)]
    chart = Curves(
        "Distance of adjacent images",
        {"distance": points(middles, result["by_interval"])},
        "between two noises",
        level=Level("mean", number(result["mean_distance"])),
    )
    caption = (
        "Mean distance of adjacent images between two noises. Its standard deviation (ISTD) is "
        f"{with_error(result)}."
    )
    return [Card("Smoothness of interpolation", chart, caption)]


DRAWN: dict[str, Callable[[Result], list[Card]]] = {
    "denoising_error": denoising_error,
    "prediction_error": prediction_error,
    "exposure_bias": exposure_bias,
    "cumulative_error": cumulative_error,
    "smoothness": smoothness,
}


def points(x: object, y: object) -> tuple[list[float], list[float]]:
    """Return two JSON lists as the points of a curve, NaN for null."""
    return numbers(x), numbers(y)


def band_of(x: object, y: object, error: object) -> Band | None:
    """Return a band of two standard errors around a curve; None if they are not known.

    Args:
        x: A JSON list.
        y: Values there.
        error: Their standard errors; None for a result of before there were any.
    """
    if error is None:
        return None
    around = list(zip(numbers(y), numbers(error), strict=True))
    low = [value - 2 * spread for value, spread in around]
    high = [value + 2 * spread for value, spread in around]
    return Band(numbers(x), low, high)


def with_error(result: Result) -> str:
    """Format the value of a result, with its standard error if that is known."""
    value, error = result.get("value"), result.get("standard_error")
    if value is None or error is None:
        return short(value)
    return f"{short(value)} ± {short(error)}"


def short(value: object) -> str:
    """Format a number of a caption with three digits."""
    return "not known" if value is None else f"{number(value):.3g}"

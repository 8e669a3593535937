"""Charts of RUN/diagnostics.json for the report: noise to the left, as everywhere. Knows the results' keys; needs no torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from difftrain.report.plots import INK, SERIES, chart, finite, legend, logarithmic_where_wide

Result = Mapping[str, Any]
Numbers = Sequence[float | None]
Curve = tuple[Numbers, Numbers]
LOG_SNR, TIMESTEP = "log-SNR (noise ←)", "timestep (noise →)"


class Plot(NamedTuple):
    """figure: an SVG for the page, drawn in its colours."""

    title: str
    caption: str
    figure: str


def plots(results: Mapping[str, Result]) -> list[Plot]:
    """What there is to draw of the diagnostics in RUN/diagnostics.json; a result without curves has none."""
    return [plot for name, draw in DRAWN.items() if name in results for plot in draw(results[name])]


def denoising_error(result: Result) -> list[Plot]:
    sets = {"held-out": "held_out", "training": "training"}
    x, known = result["log_snr"], {label: result[key] for label, key in sets.items() if key in result}
    drawn = [
        Plot("Error of x0 by noise level", "Mean squared error of the network's estimate of the clean image, by pixel.",
             curves({label: (x, errors["x0_error"]) for label, errors in known.items()}, "Error of x0 over log-SNR", LOG_SNR)),
    ]  # fmt: skip
    if "gap" in result:
        gap, error = result["gap"]["loss"], result["gap_standard_error"]["loss"]
        around = (x, [shifted(gap, error, -2), shifted(gap, error, 2)])
        caption = ("Loss on held-out minus loss on training images, within two standard errors. At the noise end it is the sets' own "
                   "difference; above that, the network knows its training images by heart.")
        figure = curves({"gap": (x, gap)}, "Held-out minus training loss over log-SNR", LOG_SNR, level=("", 0.0), around=around)
        drawn.append(Plot("Held-out gap", caption, figure))
    return drawn


def prediction_error(result: Result) -> list[Plot]:
    t = result["t"]
    width = curves({"nu": (t, result["nu"])}, "Spread of the prediction error over t", TIMESTEP)
    rejected = curves({"rejected": (t, result["rejected"])}, "Fraction of pixels with errors that are not Gaussian", TIMESTEP,
                      level=("of Gaussian errors", result["nominal_rejected"]))
    return [
        Plot("Spread of the prediction error",
             f"Standard deviation of the error of x0, mean over pixels; over all t {short(result['value'])}.", width),
        Plot("Is the prediction error Gaussian?", "Fraction of pixels whose errors fail a Shapiro-Wilk test at 5 %.", rejected),
    ]  # fmt: skip


def exposure_bias(result: Result) -> list[Plot]:
    t, norms, drift = result["t"], result["eps_norm"], result["drift"]
    chain, single = result["consecutive"], result["one_step"]
    delta = {
        f"{name}{of}": (t, curve[key])
        for name, curve in (("chain", chain), ("one step", single)) for key, of in (("delta", ""), ("floor", ", floor"))
    }  # fmt: skip
    return [
        Plot("Exposure bias", "Excess spread of sampled x_t around the scaled image. A chain forgets its image, so a perfect model does "
             "not score 0: the floor is its score on Gaussian data of the same variances.",
             curves(delta, "Exposure bias over t", TIMESTEP, log=False)),
        Plot("Norm of the predicted noise", "Mean norm along sampling minus that at true noised images.",
             curves({"gap": (norms["t"], norms["gap"])}, "Gap of the norm of the predicted noise", TIMESTEP, level=("", 0.0))),
        Plot("Drift without noise", "Mean absolute error of the image after the last n reverse steps by posterior means.",
             curves({"error": (drift["steps"], drift["error"])}, "Drift over the number of steps", "reverse steps n")),
    ]  # fmt: skip


def cumulative_error(result: Result) -> list[Plot]:
    t = result["t"]
    named = {"model": (t, result["u"])} | ({"training images": (t, result["training"])} if "training" in result else {})
    caption = "Unbiased MMD² of reverse chains stopped at t and noised held-out images; a perfect model is at 0, up to noise."
    return [Plot("Cumulative error", caption, curves(named, "MMD over t", TIMESTEP, level=("perfect", 0.0)))]


def smoothness(result: Result) -> list[Plot]:
    middles = [(a + b) / 2 for a, b in zip(result["position"], result["position"][1:], strict=False)]
    caption = f"Mean distance of adjacent images between two noises; their standard deviation, ISTD, is {short(result['value'])}."
    distance, level = {"distance": (middles, result["by_interval"])}, ("mean", result["mean_distance"])
    figure = curves(distance, "Distance of adjacent images", "between two noises", level)
    return [Plot("Smoothness of interpolation", caption, figure)]


DRAWN: dict[str, Callable[[Result], list[Plot]]] = {
    "denoising_error": denoising_error, "prediction_error": prediction_error, "exposure_bias": exposure_bias,
    "cumulative_error": cumulative_error, "smoothness": smoothness,
}  # fmt: skip


def curves(
    named: Mapping[str, Curve], alt: str, x_label: str, level: tuple[str, float | None] | None = None,
    around: tuple[Numbers, list[Numbers]] | None = None, log: bool = True,
) -> str:
    """Curves of numbers, None where there is none; a `level` is a dashed line, `around` (x, [low, high]) a faint band. The axis is
    logarithmic where that shows more, unless there is a level or `log` forbids it."""
    series = {}
    for name, (x, y) in named.items():
        known = [(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None]
        if known:
            series[name] = finite(([a for a, _ in known], [b for _, b in known]))
    if not series:
        return "<p>Nothing finite to draw.</p>"

    def draw(axes: Any) -> None:
        for i, (name, (x, y)) in enumerate(series.items()):
            look = {"color": SERIES[i % len(SERIES)], "marker": "o" if len(x) < 30 else None, "linestyle": "--" if i % 2 else "-"}
            axes.plot(x, y, label=name if len(series) > 1 else None, **look)
        if around is not None:
            x, low, high = np.array([[np.nan if v is None else v for v in values] for values in (around[0], *around[1])])
            axes.fill_between(x, low, high, color=SERIES[0], alpha=0.2, linewidth=0)
        if level is not None and level[1] is not None:
            axes.axhline(level[1], color=INK, linewidth=1.1, linestyle=(0, (4, 3)), label=level[0] or None)
        elif log:
            logarithmic_where_wide(axes, np.concatenate([y for _, y in series.values()]))
        axes.set_xlabel(x_label)
        legend(axes)

    return chart(draw, alt)


def shifted(values: Numbers, errors: Numbers, times: float) -> Numbers:
    return [v + times * e if v is not None and e is not None else None for v, e in zip(values, errors, strict=True)]


def short(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3g}"

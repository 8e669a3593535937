"""Schedules and weights against stored numbers with 12 digits, which round by 1e-11."""

import pytest
import torch
from helpers.support import assert_close, float64, golden

from difftrain.objective.schedule import SCHEDULES, NoiseLevel, NoiseSchedule
from difftrain.objective.slots import WEIGHTINGS
from difftrain.objective.transitions import posterior
from difftrain.objective.weightings import P2, Debiased, MinSNR, converted, weight_table

WRITTEN = 1e-11
WEIGHTS = {"p2(1)": P2(1.0), "p2(0.5)": P2(0.5), "debiased": Debiased(), "min_snr(5)": MinSNR(5.0)}
ROWS = golden("schedules")["rows"]


def schedule_named(name):
    kind, _, zero_terminal = name.partition(" ")
    return SCHEDULES.parse(
        {"type": kind, **({zero_terminal: True} if zero_terminal else {})}, "schedule"
    ).build()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['schedule']}-{row['t']}")
def test_schedule_has_the_stored_alpha_and_snr(row):
    level = schedule_named(row["schedule"]).level(torch.tensor([row["t"]]))

    assert_close(level.alpha**2, float64([row["alpha_squared"]]), relative=WRITTEN)
    assert_close(level.sigma**2, 1 - float64([row["alpha_squared"]]), absolute=1e-12)
    assert_close(level.snr, float64([row["snr"]]), relative=WRITTEN)


@pytest.mark.parametrize("column", [key for key in ROWS[0] if " " in key])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['schedule']}-{row['t']}")
def test_weight_is_the_stored_one(row, column):
    name, kind = column.split()
    level = schedule_named(row["schedule"]).level(torch.tensor([row["t"]]))

    weight = WEIGHTS[name](level) if kind == "epsilon" else converted(WEIGHTS[name], kind, level)

    # A limit of 0 is reached to 1e-12.
    assert_close(weight, float64([row[column]]), relative=WRITTEN, absolute=1e-12)


def test_debiased_weight_of_the_sample_error_is_the_stored_one():
    stored = golden("schedules")["sample"]
    level = NoiseSchedule.linear().level(torch.tensor(stored["t"]))

    assert_close(
        converted(Debiased(), "sample", level), float64(stored["debiased"]), relative=WRITTEN
    )


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    "row", golden("flow_weights")["rows"], ids=lambda row: f"sigma={row['sigma']}"
)
def test_weight_of_the_flow_error_is_the_stored_one_and_its_limit_at_both_ends(row, name):
    sigma = float64([row["sigma"]])
    level = NoiseLevel(1 - sigma, sigma)

    assert_close(level.snr, float64([row["snr"]]), relative=WRITTEN)
    assert_close(
        converted(WEIGHTS[name], "flow_prediction", level),
        float64([row[name]]),
        relative=WRITTEN,
        absolute=2e-12,
    )


@pytest.mark.parametrize("column", [key for key in golden("kohya") if " " in key])
def test_weight_on_kohyas_error_is_kohyas(column):
    name, kind = column.split()
    table = weight_table(
        WEIGHTINGS.parse(name, "weighting").build(), kind, NoiseSchedule.scaled_linear()
    )
    stored = golden("kohya")

    # Theirs is a float32 table of alpha^2: at t = 0 the SNR of 1175 is off by 3e-5, which only
    # min_snr shows.
    rounding = 3e-5 if name == "min_snr" else 2e-6
    assert_close(table[stored["t"]], float64(stored[column]), relative=rounding)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_published_debiased_weight_is_not_kohyas(kind):
    stored = float64(
        golden("kohya")[
            "kohya_debiased epsilon" if kind == "epsilon" else "kohya_debiased_v v_prediction"
        ]
    )
    published = weight_table(Debiased(), kind, NoiseSchedule.scaled_linear())[golden("kohya")["t"]]

    differ = (published / stored - 1).abs() > 0.05
    # On epsilon only the cut, on v everywhere.
    assert differ.tolist() == [
        True,
        kind != "epsilon",
        kind != "epsilon",
        kind != "epsilon",
    ]


def test_sigmoid_schedule_has_the_stored_alpha():
    stored = golden("sigmoid_schedule")
    schedule = SCHEDULES.parse("sigmoid", "schedule").build()
    level = schedule.level(torch.tensor([0, 500, 999]))

    # The official number is a float32 in 8 digits.
    assert_close((level.alpha**2)[0], stored["alpha_squared"]["0"], absolute=4e-8)
    assert_close(
        (level.alpha**2)[1:],
        float64([stored["alpha_squared"][t] for t in ("500", "999")]),
        relative=1e-10,
    )
    assert_close(
        1 - (schedule.alpha[999] / schedule.alpha[998]) ** 2, stored["beta_999"], absolute=1e-12
    )


@pytest.mark.parametrize("t", ["1", "500", "999"])
def test_posterior_on_the_sigmoid_schedule_is_the_stored_one(t):
    stored = golden("sigmoid_schedule")["posterior"][t]
    schedule = SCHEDULES.parse("sigmoid", "schedule").build()
    at = torch.tensor([int(t)])
    levels = schedule.level(at), schedule.level_before(at)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)

    of_x0, of_x_t = posterior(one, zero, *levels), posterior(zero, one, *levels)

    # float64 with 1 - alpha_squared cancelled once: 1e-16 / 1.5e-4
    assert_close(
        torch.stack([of_x0.mean[0, 0], of_x_t.mean[0, 0], of_x0.variance[0]]),
        float64(stored),
        relative=1e-11,
    )

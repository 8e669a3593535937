"""Each weighting against its formula, its limits, and its conversion between parameterizations."""

import json
import math

import pytest
import torch
from helpers.support import PARAMETERIZATIONS, assert_close, images
from hypothesis import given
from hypothesis import strategies as st

from difftrain.core.errors import InputError
from difftrain.core.registry import registered_name
from difftrain.objective.kohya_weightings import (
    KohyaDebiased,
    KohyaDebiasedV,
    KohyaScaledV,
    KohyaVPredLike,
)
from difftrain.objective.parameterization import estimate, target
from difftrain.objective.schedule import (
    SCHEDULES,
    NoiseLevel,
    NoiseSchedule,
    diffuse,
    expand_like,
)
from difftrain.objective.slots import WEIGHTINGS
from difftrain.objective.weightings import (
    P2,
    Debiased,
    MinSNR,
    SoftMinSNR,
    TruncatedSNR,
    Unit,
    converted,
    weight_curve,
    weight_table,
)

SNR = torch.logspace(-4, 4, 17, dtype=torch.float64)
LEVEL = NoiseLevel((SNR / (1 + SNR)).sqrt(), (1 / (1 + SNR)).sqrt())
EVERY_WEIGHTING = [
    Unit(),
    P2(0.5),
    P2(1.0),
    P2(2.0, k=0.5),
    Debiased(),
    MinSNR(5.0),
    SoftMinSNR(4.0),
    TruncatedSNR(),
    KohyaDebiased(),
    KohyaDebiasedV(),
    KohyaScaledV(),
    KohyaVPredLike(0.5),
]
CUT = torch.minimum(SNR, torch.tensor(1000.0))  # the SNR as sd-scripts sees it
amounts = st.lists(st.floats(0.05, 3.0), min_size=3, max_size=3).map(
    lambda v: torch.tensor(v, dtype=torch.float64)
)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        (Unit(), SNR**0),
        (P2(0.5, k=2.0), 1 / (2 + SNR).sqrt()),
        (Debiased(), SNR**-0.5),
        (Debiased(max_weight=3.0), torch.minimum(SNR**-0.5, torch.tensor(3.0))),
        (MinSNR(5.0), torch.minimum(SNR, torch.tensor(5.0)) / SNR),
        (SoftMinSNR(4.0), 4 / (SNR + 4)),
        (TruncatedSNR(), torch.maximum(SNR, torch.tensor(1.0))),
        (KohyaDebiased(), 1 / CUT.sqrt()),
        (KohyaDebiasedV(), 1 / (CUT + 1)),
        (KohyaScaledV(), CUT / (CUT + 1)),
        (KohyaVPredLike(0.5), 1 + 0.5 * (CUT + 1) / CUT),
    ],
    ids=lambda value: repr(value) if not isinstance(value, torch.Tensor) else "",
)
def test_weight_is_its_formula(weighting, expected):
    assert_close(weighting(LEVEL), expected, relative=1e-11)


@pytest.mark.parametrize(
    ("weighting", "of_x0"),
    [
        (MinSNR(5.0), torch.minimum(SNR, torch.tensor(5.0))),
        (SoftMinSNR(4.0), 4 * SNR / (SNR + 4)),
        (TruncatedSNR(), torch.maximum(SNR, torch.tensor(1.0))),
        (Debiased(), SNR**0.5),
    ],
    ids=["min_snr", "soft_min_snr", "truncated_snr", "debiased"],
)
def test_weight_of_the_sample_error_is_the_published_form(weighting, of_x0):
    assert_close(converted(weighting, "sample", LEVEL), of_x0, relative=1e-11)


def test_truncated_snr_on_epsilon_is_at_least_one():
    assert_close(
        converted(TruncatedSNR(), "epsilon", LEVEL),
        torch.maximum(1 / SNR, torch.tensor(1.0)),
        relative=1e-11,
    )


@pytest.mark.parametrize(
    ("weighting", "same"),
    [
        (P2(gamma=0.0), Unit()),
        (MinSNR(gamma=1e6), Unit()),
        (Debiased(max_weight=1e6), Debiased()),
        (KohyaVPredLike(scale=0.0), Unit()),
    ],
    ids=["p2", "min_snr", "debiased", "kohya_v_pred_like"],
)
def test_weighting_at_its_limit_is_the_other_one(weighting, same):
    assert torch.equal(weighting(LEVEL), same(LEVEL))


@pytest.mark.parametrize(
    ("weighting", "kind", "plain", "of"),
    [
        (KohyaDebiased(), "epsilon", Debiased(), "epsilon"),
        (KohyaDebiasedV(), "sample", Unit(), "sample"),
        (KohyaScaledV(), "epsilon", Unit(), "epsilon"),
    ],
    ids=["kohya_debiased", "kohya_debiased_v", "kohya_scaled_v"],
)
def test_a_weighting_of_kohya_is_a_plain_one_up_to_an_snr_of_1000_and_not_beyond(
    weighting, kind, plain, of
):
    found, expected = converted(weighting, kind, LEVEL), converted(plain, of, LEVEL)

    assert_close(found[SNR <= 1000], expected[SNR <= 1000], relative=1e-11)
    assert bool(((found / expected - 1).abs() > 5e-4)[SNR > 1000].all())


def test_debiased_weights_of_kohya_on_v_are_not_the_papers():
    """Three losses are called debiased v-prediction: the paper's, converted, and two trainers'."""
    assert_close(
        converted(Debiased(), "v_prediction", LEVEL), SNR.sqrt() / (SNR + 1), relative=1e-11
    )
    ratio = converted(KohyaDebiasedV(), "v_prediction", LEVEL) / converted(
        Debiased(), "v_prediction", LEVEL
    )
    assert bool(((ratio - 1).abs() > 0.2)[SNR != 1].all())


def test_soft_min_snr_is_a_scaled_p2():
    assert_close(SoftMinSNR(4.0)(LEVEL), 4 * P2(1.0, k=4.0)(LEVEL), relative=1e-14)


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_unit_weighs_whatever_error_is_trained_by_one(kind):
    assert torch.equal(converted(Unit(), kind, LEVEL), torch.ones(17, dtype=torch.float64))


@pytest.mark.parametrize("weighting", EVERY_WEIGHTING[1:], ids=repr)
@given(alpha=amounts, sigma=amounts)
def test_converted_weight_has_the_same_gradient_on_x0_through_every_parameterization(
    weighting, alpha, sigma
):
    level = NoiseLevel(alpha, sigma)
    x0 = images(3)
    eps = images(3, seed=1)
    x_t = diffuse(x0, eps, level)
    gradients = {}
    for kind in PARAMETERIZATIONS:
        x0_hat = images(3, seed=2).requires_grad_(True)
        eps_hat = (x_t - expand_like(alpha, x_t) * x0_hat) / expand_like(sigma, x_t)
        output = target(kind, x0_hat, eps_hat, level)  # the output that implies x0_hat at this x_t
        assert_close(estimate(kind, output, x_t, level).x0, x0_hat, absolute=1e-11)
        errors = (output - target(kind, x0, eps, level)).square().flatten(1).mean(1)
        (gradients[kind],) = torch.autograd.grad(
            (converted(weighting, kind, level) * errors).sum(), x0_hat
        )

    for kind in PARAMETERIZATIONS:
        assert_close(gradients[kind], gradients["epsilon"], relative=1e-9, absolute=1e-12)


ENDS = NoiseLevel(torch.tensor([0.0, 1.0]).double(), torch.tensor([1.0, 0.0]).double())


@pytest.mark.parametrize(
    ("weighting", "kind", "at_snr_0_and_infinity"),
    [
        (P2(1.0), "sample", [0, 1]),
        (P2(2.0), "sample", [0, 0]),
        (P2(1.0), "v_prediction", [0, 0]),
        (P2(1.0), "epsilon", [1, 0]),
        (Debiased(), "v_prediction", [0, 0]),
        (Debiased(), "flow_prediction", [0, 0]),
        (MinSNR(5.0), "epsilon", [1, 0]),
        (MinSNR(5.0), "sample", [0, 5]),
        (MinSNR(5.0), "v_prediction", [0, 0]),
        (SoftMinSNR(4.0), "sample", [0, 4]),
        (TruncatedSNR(), "v_prediction", [1, 1]),
    ],
    ids=str,
)
def test_weight_at_the_ends_of_a_schedule_is_its_limit(weighting, kind, at_snr_0_and_infinity):
    assert_close(
        converted(weighting, kind, ENDS), torch.tensor(at_snr_0_and_infinity), absolute=1e-11
    )
    from_noise_to_image = NoiseSchedule(ENDS.alpha.flip(0), ENDS.sigma.flip(0), {})
    assert_close(
        weight_table(weighting, kind, from_noise_to_image),
        torch.tensor(at_snr_0_and_infinity).flip(0),
        absolute=1e-11,
    )


def schedule_ending_at(alpha, sigma):
    return NoiseSchedule(torch.tensor([0.9, alpha]), torch.tensor([0.3, sigma]), {})


@pytest.mark.parametrize(
    ("weighting", "kind", "ends", "snr"),
    [
        (Debiased(), "sample", (1.0, 0.0), "infinity"),
        (P2(0.5), "sample", (1.0, 0.0), "infinity"),
        (P2(0.95), "sample", (1.0, 0.0), "infinity"),
        (TruncatedSNR(), "sample", (1.0, 0.0), "infinity"),
        (Debiased(), "epsilon", (0.0, 1.0), "0"),
        (TruncatedSNR(), "epsilon", (0.0, 1.0), "0"),
    ],
)
def test_a_weight_that_diverges_on_the_schedule_is_rejected(weighting, kind, ends, snr):
    with pytest.raises(InputError) as error:
        weight_table(weighting, kind, schedule_ending_at(*ends))
    bounded = "without zero terminal SNR" if snr == "0" else "with noise at every timestep"
    assert str(error.value) == (
        f"weighting {registered_name(weighting)!r} on the {kind} error grows without bound where "
        f"SNR = {snr} (t = 1 of this schedule). Use a schedule {bounded}, "
        "parameterization: v_prediction, or weighting: {type: min_snr}."
    )


def test_debiased_with_a_maximum_is_accepted_where_it_would_diverge():
    assert_close(
        weight_table(Debiased(max_weight=7.0), "epsilon", schedule_ending_at(0.0, 1.0)),
        torch.tensor([1 / 3, 7.0]),
        relative=1e-7,
    )


# Both ends of every schedule, by hand


def cut(a, s):
    """min(SNR, 1000) as a fraction of (above, below) that holds at either end."""
    return (a * a, s * s) if a * a <= 1000 * s * s else (1000.0, 1.0)


# n of each weighting, by hand: its weight is n / s^2 on the x0 error, n / a^2 on epsilon,
# n / (a^2 + s^2)^2 on v, n / (a + s)^2 on u.
COMMON = {
    "p2": lambda a, s: a**2 * s**2 / (s**2 + a**2),
    "debiased": lambda a, s: a * s,
    "min_snr": lambda a, s: min(a**2, 5 * s**2),
    "soft_min_snr": lambda a, s: 5 * a**2 * s**2 / (a**2 + 5 * s**2),
    "truncated_snr": lambda a, s: max(a**2, s**2),
    "kohya_debiased": lambda a, s: max(a * s, a**2 / math.sqrt(1000)),
    "kohya_debiased_v": lambda a, s: (a**2 + s**2) ** 2 * cut(a, s)[1] / sum(cut(a, s)),
    "kohya_scaled_v": lambda a, s: (a**2 + s**2) ** 2 * cut(a, s)[0] / sum(cut(a, s)),
    "kohya_v_pred_like": lambda a, s: 2 * a**2 + max(s**2, a**2 / 1000),
}
DIVISOR = {
    "sample": lambda a, s: s**2,
    "epsilon": lambda a, s: a**2,
    "v_prediction": lambda a, s: (a**2 + s**2) ** 2,
    "flow_prediction": lambda a, s: (a + s) ** 2,
}
ON_EPSILON_AT_SNR_0 = {  # n and a^2 are both 0 there: the limit of their ratio; None: there is none
    "p2": 1,
    "debiased": None,
    "min_snr": 1,
    "soft_min_snr": 1,
    "truncated_snr": None,
    "kohya_debiased": None,
    "kohya_debiased_v": None,
    "kohya_scaled_v": 1,
    "kohya_v_pred_like": None,
}
ON_SAMPLE_AT_SNR_INFINITY = {  # likewise of n and s^2
    "p2": 1,
    "debiased": None,
    "min_snr": 5,
    "soft_min_snr": 5,
    "truncated_snr": None,
    "kohya_debiased": None,
    "kohya_debiased_v": None,
    "kohya_scaled_v": None,
    "kohya_v_pred_like": None,
}


def by_hand(name, kind, a, s):
    """The weight at (alpha, sigma), its limit at an end, None where it diverges."""
    if name == "unit":
        return 1
    if kind == "epsilon" and a == 0:
        return ON_EPSILON_AT_SNR_0[name]
    if kind == "sample" and s == 0:
        return ON_SAMPLE_AT_SNR_INFINITY[name]
    return COMMON[name](a, s) / DIVISOR[kind](a, s)


DIFFUSIONS = [name for name in SCHEDULES.constructors if name != "flow"]
EVERY_SCHEDULE = [
    *[{"type": name} for name in SCHEDULES.constructors],
    *[{"type": name, "zero_terminal_snr": True} for name in DIFFUSIONS],
    {"type": "flow", "shift": 3.0},
    # beta_start 1e-18: sigma is 0 at t = 0.
    {"type": "linear", "beta_start": 1e-18},
    {"type": "linear", "beta_start": 1e-18, "zero_terminal_snr": True},
]


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
@pytest.mark.parametrize("block", EVERY_SCHEDULE, ids=str)
@pytest.mark.parametrize("name", ["unit", *COMMON])
def test_weight_at_both_ends_of_every_schedule_is_the_limit_by_hand_or_an_error_with_a_remedy(
    name, block, kind
):
    weighting = WEIGHTINGS.parse(name, "weighting").build()
    schedule = SCHEDULES.parse(block, "schedule").build()
    ends = [(schedule.alpha[i].item(), schedule.sigma[i].item()) for i in (0, -1)]
    expected = [by_hand(name, kind, *end) for end in ends]
    if None not in expected:
        table = weight_table(weighting, kind, schedule)
        assert_close(
            table[[0, -1]],
            torch.tensor(expected, dtype=torch.float64),
            relative=1e-9,
            absolute=1e-11,
        )
        assert bool(((table >= 0) & table.isfinite()).all())
        return
    t, snr = (0, "infinity") if expected[0] is None else (999, "0")
    with pytest.raises(InputError) as error:
        weight_table(weighting, kind, schedule)
    where = f"grows without bound where SNR = {snr} (t = {t} of this schedule). Use a schedule "
    assert str(error.value).startswith(
        f"weighting {registered_name(weighting)!r} on the {kind} error {where}"
    )
    assert str(error.value).endswith(
        ", parameterization: v_prediction, or weighting: {type: min_snr}."
    )
    weight_table(weighting, "v_prediction", schedule)
    weight_table(MinSNR(), kind, schedule)
    weight_table(weighting, kind, NoiseSchedule.linear())


def test_the_weights_by_hand_are_those_of_every_weighting_of_the_library():
    own = {
        name
        for name, constructor in WEIGHTINGS.constructors.items()
        if constructor.__module__.startswith("difftrain.")
    }
    assert (
        own
        == {"unit", *COMMON}
        == {"unit", *ON_EPSILON_AT_SNR_0}
        == {"unit", *ON_SAMPLE_AT_SNR_INFINITY}
    )


@pytest.mark.parametrize(
    ("weight", "shown"), [(-0.5, "-0.5"), (math.nan, "nan"), (math.inf, "inf")]
)
def test_an_own_weight_that_is_negative_or_no_number_is_rejected_with_its_timestep(weight, shown):
    class Own:
        stated_for = "epsilon"

        def __call__(self, level):
            return torch.where(level.snr < 0.5, weight, 1.0).double()

    with pytest.raises(InputError) as error:
        weight_table(
            Own(), "epsilon", NoiseSchedule(torch.tensor([0.8, 0.6]), torch.tensor([0.6, 1.2]), {})
        )
    assert str(error.value) == (
        f"weighting 'Own' on the epsilon error is {shown} at t = 1, where SNR = 0.25. "
        "A weight must be finite and not negative: bound it there, or use weighting: "
        "{type: min_snr}."
    )


def test_a_schedule_without_numbers_is_rejected():
    of_one = NoiseSchedule.linear(1, zero_terminal_snr=True)  # nothing to rescale: 0 / 0
    with pytest.raises(
        InputError,
        match=r"^weighting 'unit' on the v_prediction error is nan at t = 0, where SNR = nan\. ",
    ):
        weight_table(Unit(), "v_prediction", of_one)


# The curve of the report


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_the_curve_shows_the_table_and_the_same_weight_on_the_epsilon_error(kind):
    schedule = NoiseSchedule.linear()
    curve = weight_curve(weight_table(P2(0.5), kind, schedule), kind, schedule, most=11)

    t = torch.tensor([0, 100, 200, 300, 400, 500, 599, 699, 799, 899, 999])
    assert (curve["trained_error"], curve["t"]) == (kind, t.tolist())
    assert_close(curve["log_snr"], schedule.level(t).log_snr)
    assert_close(curve["weight"], weight_table(P2(0.5), kind, schedule)[t])
    assert_close(curve["weight_on_epsilon"], P2(0.5)(schedule.level(t)), relative=1e-9)


def test_the_curve_of_plain_v_is_one_and_on_the_epsilon_error_one_over_alpha_squared():
    schedule = NoiseSchedule.cosine(50)
    curve = weight_curve(torch.ones(50).double(), "v_prediction", schedule)

    assert curve["t"] == list(range(50))
    assert_close(curve["weight_on_epsilon"], schedule.alpha**-2, relative=1e-9)


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [
        (NoiseSchedule.linear(10, zero_terminal_snr=True), "v_prediction"),
        (NoiseSchedule.flow(10), "flow_prediction"),
        (NoiseSchedule.flow(10), "sample"),
        (schedule_ending_at(1.0, 0.0), "v_prediction"),
    ],
    ids=["zero_terminal", "flow", "flow sample", "no noise"],
)
def test_the_curve_is_json_at_infinite_ends_and_keeps_the_weight_there(schedule, kind):
    curve = weight_curve(weight_table(MinSNR(), kind, schedule), kind, schedule)

    assert json.loads(json.dumps(curve, allow_nan=False)) == curve
    assert [curve[key][-1] for key in ("log_snr", "weight_on_epsilon")] == [None, None]
    assert None not in curve["weight"]
    assert None not in curve["log_snr"][:-1] + curve["weight_on_epsilon"][:-1]


# Mean weight over t with 5 digits, recorded elsewhere: a second route to the tables.
@pytest.mark.parametrize(
    ("schedule", "weighting", "mean"),
    [
        (NoiseSchedule.linear(), P2(1.0), 0.72449),
        (NoiseSchedule.linear(), P2(0.5), 0.80589),
        (NoiseSchedule.linear(), Debiased(), 17.817),
        (NoiseSchedule.linear(), MinSNR(5.0), 0.91307),
        (NoiseSchedule.cosine(), P2(1.0), 0.50442),
        (NoiseSchedule.cosine(), Debiased(), 24.809),
        (NoiseSchedule.cosine(), MinSNR(5.0), 0.82402),
        (NoiseSchedule.scaled_linear(), P2(1.0), 0.62663),
        (NoiseSchedule.scaled_linear(), Debiased(), 3.0213),
        (NoiseSchedule.scaled_linear(), MinSNR(5.0), 0.91657),
    ],
    ids=str,
)
def test_mean_weight_over_the_schedule_is_the_recorded_one(schedule, weighting, mean):
    assert_close(weight_table(weighting, "epsilon", schedule).mean(), mean, relative=2e-5)

"""MMD of reverse processes and noised images: near 0 for the perfect network alone."""

import dataclasses
import json

import pytest
import torch
from helpers.subjects import COSINE, clean, f64, gaussian_subject, subject
from helpers.support import Gaussian, assert_close

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.diagnostics.cumulative_error import CumulativeError
from difftrain.diagnostics.mmd_error import error_of_u, pair_kernel
from difftrain.objective.mmd import BANDWIDTHS, mmd
from difftrain.objective.variance import LearnedRange

DIAGNOSTIC = {"num": 300, "steps": 100, "num_timesteps": 5}
DATA = Gaussian(0.3, 0.7)


@pytest.fixture(scope="module")
def perfect():
    training = clean(DATA.batch(300, seed=5).x0)
    return CumulativeError(**DIAGNOSTIC)(gaussian_subject(DATA, 300, training=training))


@pytest.fixture(scope="module")
def wrong():
    """The perfect network of data that spread twice as far."""
    network = Gaussian(0.3, 1.4).denoiser("v_prediction", COSINE)
    return CumulativeError(**DIAGNOSTIC)(subject(network, DATA.batch(300).x0, kind="v_prediction"))


def naive(x, y, bandwidth):
    """(V, U) by loops over the definition."""

    def k(a, b):
        return sum(torch.exp(-(a - b).square().sum() / (m * bandwidth)).item() for m in BANDWIDTHS)

    n, m = len(x), len(y)
    across = sum(k(a, b) for a in x for b in y) / n / m
    v = (
        sum(k(a, b) for a in x for b in x) / n**2
        + sum(k(a, b) for a in y for b in y) / m**2
        - 2 * across
    )
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / n / (n - 1)
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / m / (m - 1)
    return v, xx + yy - 2 * across


def test_mmd_at_a_given_bandwidth_is_that_of_the_definition():
    x, y = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    assert_close(torch.stack(mmd(x, y[:4] + 1, 2.5)), naive(x, y[:4] + 1, 2.5), absolute=1e-12)


def test_the_perfect_network_is_near_0_at_every_level(perfect):
    assert (
        f64(perfect["u"]).abs().max() < 0.02
    )  # a level's U has a standard error of about 0.004 here
    assert f64(perfect["training"]).abs().max() < 0.02
    assert perfect["t"] == [-1, 0, 252, 505, 747, 999]


def test_v_lies_above_its_floor_by_as_much_as_u_lies_above_0(perfect):
    """E V - E U of equal distributions is the floor; of one sample they differ by kernel means."""
    assert_close(f64(perfect["v"]) - f64(perfect["v_floor"]), f64(perfect["u"]), absolute=1e-3)


def test_a_wrong_network_drifts_away_towards_the_clean_images(perfect, wrong):
    assert wrong["u"][0] > 20 * max(abs(u) for u in perfect["u"][1:3])
    assert wrong["u"][0] > wrong["u"][3] > wrong["u"][4]
    assert abs(wrong["u"][-1]) < 0.02


def test_models_that_see_the_same_images_share_their_bandwidths(perfect, wrong):
    assert perfect["bandwidth"] == wrong["bandwidth"]
    level = COSINE.level(torch.tensor(perfect["t"][1:]))
    expected = (
        2 * 8 * (level.alpha**2 * DATA.std**2 + level.sigma**2)
    )  # mean squared distance of two samples in 8 dimensions

    assert_close(f64(perfect["bandwidth"][1:]), expected, relative=0.06)


def test_the_numbers_are_mmd_of_the_chains_own_states(perfect):
    """At the top a chain is its initial noise."""
    x = Rng(0, 0, range(300)).normal((1, 2, 4), "diagnostics.initial").double().flatten(1)
    of = gaussian_subject(DATA, 300)
    y = of.noised(of.held_out, range(300), 999, 0)[2].flatten(1)

    assert_close(perfect["u"][-1], mmd(x, y, perfect["bandwidth"][-1])[1], absolute=1e-9)


def test_the_deterministic_chain_of_the_perfect_network_ends_near_the_data_too():
    found = CumulativeError(**DIAGNOSTIC, step="ddim")(gaussian_subject(DATA, 300))

    assert f64(found["u"]).abs().max() < 0.02


def test_the_training_images_have_noise_of_their_own():
    """With the held-out images' noise the same images would be the same samples, and U = -floor."""
    x0 = DATA.batch(300).x0
    found = CumulativeError(num=300, steps=1, num_timesteps=1)(
        gaussian_subject(DATA, 300, training=clean(x0))
    )

    assert found["training"][1] > -found["v_floor"][1] / 2
    assert_close(
        found["training"][0], -found["v_floor"][0], relative=1e-9
    )  # without noise they are the same


def test_bandwidths_of_another_run_are_taken_and_named(tmp_path, perfect):
    file = tmp_path / "diagnostics.json"
    doubled = {**perfect, "bandwidth": [2 * b for b in perfect["bandwidth"]]}
    file.write_text(json.dumps({"cumulative_error": doubled}))
    found = CumulativeError(**DIAGNOSTIC, bandwidths=str(file))(gaussian_subject(DATA, 300))

    assert found["bandwidth"] == doubled["bandwidth"]
    assert found["u"] != perfect["u"]
    assert found["protocol"]["bandwidths_from"] == str(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "holds none"),
        ('{"cumulative_error": {"t": [-1, 999], "bandwidth": [1.0, 2.0]}}', "has none for t = 0, "),
    ],
)
def test_a_file_without_these_bandwidths_is_refused(tmp_path, content, message):
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(InputError, match=message):
        CumulativeError(**DIAGNOSTIC, bandwidths=str(tmp_path / "d.json"))(gaussian_subject(num=10))


def test_one_image_cannot_be_compared():
    with pytest.raises(InputError, match="at least 2 images are compared, got 1"):
        CumulativeError(num=1)(gaussian_subject(num=10))


def with_learned_variance(v):
    """The optimal x0_hat of the data, with one v everywhere."""
    optimal = DATA.denoiser("sample", COSINE)

    def network(x, time, cond):
        x0 = optimal(x, time, cond)
        return torch.cat([x0, torch.full_like(x0, v)], dim=1)

    of = subject(network, DATA.batch(200).x0, kind="sample")
    return dataclasses.replace(of, variance=LearnedRange())


def test_the_learned_variance_is_that_of_the_steps():
    """v = -1 is the posterior's variance, a fixed model's; at v = 1 the states spread further."""
    part = CumulativeError(num=200, steps=6, num_timesteps=3)
    fixed = part(subject(DATA.denoiser("sample", COSINE), DATA.batch(200).x0, kind="sample"))
    smallest, largest = (part(with_learned_variance(v)) for v in (-1.0, 1.0))

    assert_close(f64(smallest["u"]), f64(fixed["u"]), absolute=1e-9)
    assert abs(largest["u"][0] - fixed["u"][0]) > 4 * fixed["u_standard_error"][0]


@pytest.mark.parametrize(
    ("away", "too_large"), [(0.0, 1.3), (1.0, 1.0)], ids=["equal", "different"]
)
def test_the_standard_error_is_the_spread_of_repeated_samples(away, too_large):
    """Of equal distributions it is too large, since zeta_1 is 0 and its estimate is not below."""
    generator = torch.Generator().manual_seed(0)
    found, errors = [], []
    for _ in range(300):
        x, y = torch.randn(2, 40, 2, generator=generator, dtype=torch.float64)
        kernel = pair_kernel(x, y + away, 4.0)
        found.append(float(kernel.fill_diagonal_(0).sum() / 40 / 39))
        errors.append(error_of_u(kernel))

    # The spread is known to 4 % if U is normal; it is skewed where both are equal.
    of_errors = f64(errors).square().mean().sqrt()
    assert_close(of_errors, too_large * f64(found).std(), relative=0.15)


def test_the_u_statistic_of_pairs_is_mmd_but_for_the_kernels_of_pairs():
    x, y = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel = pair_kernel(x, y, 2.5)
    itself = sum(torch.exp(-(x - y).square().sum(1) / (m * 2.5)).mean() for m in BANDWIDTHS)
    across = (5 * 2 - kernel.diagonal().mean()) / 2

    assert_close(across, itself, relative=1e-12)
    u = (kernel.sum() - kernel.diagonal().sum()) / 50 / 49
    assert_close(u, mmd(x, y, 2.5)[1], absolute=4 / 50)
    assert error_of_u(kernel[:4, :4]) != error_of_u(kernel[:4, :4])  # NaN: too few


def test_the_value_has_the_standard_error_of_all_levels_together(perfect):
    errors = f64(perfect["u_standard_error"])

    assert 0 < perfect["standard_error"] <= errors.mean()
    assert abs(perfect["value"]) < 4 * perfect["standard_error"]

"""Draws are functions of (seed, step, sample, stream), and of nothing else."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difftrain.core.rng import Rng, key, permuted

seeds = st.integers(0, 2**62)


@given(
    seed=seeds,
    step=st.integers(0, 2**40),
    samples=st.lists(st.integers(0, 10_000), min_size=1, max_size=5),
)
def test_a_row_depends_on_its_own_sample_alone(seed, step, samples):
    rows = Rng(seed, step, samples).normal((3, 2), "noise")

    for row, sample in zip(rows, samples, strict=True):
        assert torch.equal(row, Rng(seed, step, [sample]).normal((3, 2), "noise")[0])


@pytest.mark.parametrize(
    "other", [Rng(1, 2, [3]), Rng(0, 3, [3]), Rng(0, 2, [4])], ids=["seed", "step", "sample"]
)
def test_a_different_seed_step_or_sample_draws_different_numbers(other):
    assert not torch.equal(Rng(0, 2, [3]).normal((4,), "noise"), other.normal((4,), "noise"))


def test_streams_are_different_numbers():
    rng = Rng(0, 0, [0])
    assert not torch.equal(rng.normal((4,), "noise"), rng.normal((4,), "perturbation"))
    assert not torch.equal(
        rng.normal((4,), "noise"), rng.child("regularizers.0").normal((4,), "noise")
    )
    assert not torch.equal(
        rng.child("regularizers.0").normal((4,), "noise"),
        rng.child("regularizers.1").normal((4,), "noise"),
    )


def test_the_draws_of_some_rows_are_those_rows_of_the_draws():
    child = Rng(5, 6, [7, 9, 12], batch_size=16).child("a")
    some = child.of([2, 0])

    assert torch.equal(some.normal((2,), "x"), child.normal((2,), "x")[[2, 0]])
    assert (some.seed, some.step, some.samples, some.batch_size) == (5, 6, [12, 7], 16)


def test_a_child_prefixes_its_streams_and_keeps_the_samples():
    child = Rng(5, 6, [7, 9], batch_size=16).child("a").child("b")

    assert torch.equal(child.normal((2,), "x"), Rng(5, 6, [7, 9]).normal((2,), "a.b.x"))
    assert (child.seed, child.step, child.samples, child.batch_size) == (5, 6, [7, 9], 16)


def test_drawing_twice_gives_the_same_numbers():
    rng = Rng(0, 1, [2, 3])
    assert torch.equal(rng.normal((2,), "noise"), rng.normal((2,), "noise"))
    assert torch.equal(rng.uniform("timesteps"), rng.uniform("timesteps"))


def test_keys_that_differ_in_the_upper_half_of_the_seed_draw_different_numbers():
    # torch's CPU generator drops the upper 32 bits of its seed: keys without a hash would collide.
    first, second = (
        torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1 + 2**32)
    )
    assert torch.equal(first, second)
    assert not torch.equal(Rng(1).normal((4,), "noise"), Rng(1 + 2**32).normal((4,), "noise"))


def test_keys_do_not_collide_in_the_lower_32_bits_that_torch_uses():
    draws = itertools.product(range(10), range(64), ("noise", "perturbation"))
    keys = {key(0, *draw) & 0xFFFFFFFF for draw in draws}
    assert len(keys) == 10 * 64 * 2  # 1,280 of 2^32: a chance collision has probability 2e-4


def test_numbers_of_neighbouring_samples_are_independent():
    draws = Rng(0, 0, range(4000)).normal((2,), "noise").double()
    following = (draws[1:, 0] * draws[:-1, 0]).mean()

    assert abs(draws.mean()) < 4 / 8000**0.5
    assert abs(draws.var() - 1) < 4 * (2 / 8000) ** 0.5
    assert abs(following) < 4 / 4000**0.5


def test_uniform_numbers_are_float64_within_0_and_1():
    draws = Rng(0, 0, range(2000)).uniform("timesteps")

    assert draws.dtype == torch.float64
    assert draws.shape == (2000,)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 4 * (1 / 12 / 2000) ** 0.5
    assert Rng(0, 0, range(3)).uniform("u", (2, 5)).shape == (3, 2, 5)


def test_a_shared_draw_is_the_same_for_all_samples_of_a_step():
    a, b = Rng(3, 4, [0, 1], 4), Rng(3, 4, [2, 3], 4)

    assert torch.rand(3, generator=a.shared("head")).equal(
        torch.rand(3, generator=b.shared("head"))
    )
    assert not torch.rand(3, generator=a.shared("head")).equal(
        torch.rand(3, generator=a.shared("tail"))
    )


@given(seed=seeds, size=st.integers(1, 40))
def test_places_in_the_batch_are_one_permutation_over_any_split(seed, size):
    whole = Rng(seed, 0, range(size)).place_in_batch("timesteps")
    parts = [
        Rng(seed, 0, range(i, size, 3), batch_size=size).place_in_batch("timesteps")
        for i in range(min(3, size))
    ]

    assert sorted(whole.tolist()) == list(range(size))
    assert [whole[i::3].tolist() for i in range(min(3, size))] == [part.tolist() for part in parts]


def test_global_state_replays_and_leaves_no_trace():
    rng, cpu = Rng(0, 1, [2]), torch.device("cpu")
    torch.manual_seed(123)
    before = torch.get_rng_state()

    with rng.global_state("dropout", cpu):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with rng.global_state("dropout", cpu):
        assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize(
    ("other", "stream"),
    [
        (Rng(0, 1, [2]), "other"),
        (Rng(0, 1, [3]), "dropout"),
        (Rng(0, 2, [2]), "dropout"),
        (Rng(1, 1, [2]), "dropout"),
        (Rng(0, 1, [2]).child("regularizers.0"), "dropout"),
    ],
    ids=["stream", "samples", "step", "seed", "child"],
)
def test_global_state_differs_by_stream_samples_step_and_seed(other, stream):
    with Rng(0, 1, [2]).global_state("dropout", torch.device("cpu")):
        first = torch.rand(3)
    with other.global_state(stream, torch.device("cpu")):
        assert not torch.equal(torch.rand(3), first)


def test_global_state_is_restored_after_an_error():
    def failing():
        with Rng(0).global_state("dropout", torch.device("cpu")):
            raise ZeroDivisionError(torch.rand(3))

    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        failing()
    assert torch.equal(torch.get_rng_state(), before)


def test_generators_are_one_for_each_sample():
    generators = Rng(0, 1, [4, 5]).generators("sampling")
    expected = Rng(0, 1, [4, 5]).normal((3,), "sampling")

    assert torch.stack([torch.randn(3, generator=g) for g in generators]).equal(expected)


@given(seed=seeds, size=st.integers(1, 30), epoch=st.integers(0, 5))
def test_data_order_of_every_epoch_is_a_permutation(seed, size, epoch):
    assert sorted(permuted(seed, epoch * size + i, size) for i in range(size)) == list(range(size))


def test_data_order_changes_with_epoch_and_seed_and_not_with_the_order_of_asking():
    def order(seed, epoch):
        return [permuted(seed, epoch * 50 + i, 50) for i in range(50)]

    # More than are remembered.
    orders = [
        order(0, 0),
        order(0, 1),
        order(1, 0),
        *(order(7, epoch) for epoch in range(6)),
    ]
    assert len({tuple(o) for o in orders}) == len(orders)
    assert [order(0, 0), order(0, 1), order(1, 0)] == orders[:3]

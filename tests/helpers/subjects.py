"""Subjects of diagnostics with a network in closed form: the optimal one of Gaussian data."""

import torch

from difftrain.diagnostics.base import Clean, Subject
from difftrain.models.conditioning.classes import ClassConditioning
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.variance import FixedVariance
from helpers.support import Gaussian, level_at

SHAPE = (1, 2, 4)
COSINE = NoiseSchedule.cosine()
UNCONDITIONAL = ClassConditioning(None, None)


def clean(x0, labels=None):
    return Clean(len(x0), lambda indices: x0[list(indices)], labels)


def gaussian_x0(data, num, seed=0):
    return data.batch(num, seed).x0


def subject(
    network, x0, schedule=COSINE, kind="epsilon", labels=None, conditioning=UNCONDITIONAL, **more
):
    given = {"clips": False, "block_size": 64, "held_out": clean(x0, labels), **more}
    return Subject(
        network, schedule, kind, FixedVariance(), conditioning, tuple(x0.shape[1:]), **given
    )


def gaussian_subject(data=None, num=500, schedule=COSINE, kind="v_prediction", seed=0, **more):
    """The optimal network for Gaussian data, and `num` samples of it."""
    data = data or Gaussian()
    return subject(
        data.denoiser(kind, schedule), gaussian_x0(data, num, seed), schedule, kind, **more
    )


def true_x0(x0, schedule, kind):
    """The network that knows the one image x0 [C, H, W]: x0_hat is exact at any x_t."""

    def network(x, time, cond):
        level = level_at(schedule, time)
        alpha, sigma = (v.reshape(-1, 1, 1, 1).to(x) for v in (level.alpha, level.sigma))
        eps = (x - alpha * x0) / sigma
        return {
            "epsilon": eps,
            "sample": x0.expand_as(x),
            "v_prediction": alpha * eps - sigma * x0,
            "flow_prediction": eps - x0,
        }[kind]

    return network


def f64(values):
    return torch.tensor(values, dtype=torch.float64)

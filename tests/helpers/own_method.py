"""An own method, as a recipe's `imports:` brings it: a small term with state that misbehaves.

The environment says what it does at which step, counted from 0: OWN_METHOD=nan:3. The recipe stays
the same.
"""

import os
import resource
import signal
import time

import torch

from difftrain.core.registry import NonNegative, PositiveInt
from difftrain.objective.regularizers import WeightedTerm
from difftrain.objective.slots import REGULARIZERS

HANG = 600.0  # seconds of waiting for a signal from outside before the run counts as hanging


@REGULARIZERS.register("own_method")
class OwnMethod(WeightedTerm):
    """Own method: ``mean |eps|^2 / 1000``, with a running mean of it."""

    def __init__(self, weight: NonNegative = 1.0, every: PositiveInt = 1):
        super().__init__(weight, every)
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, p):
        value = p.estimate.eps.square().flatten(1).mean(1) / 1000
        action, _, step = os.environ.get("OWN_METHOD", "nothing:-1").partition(":")
        if p.rng.step == int(step):
            value = ACTIONS[action](value)
        self.mean += 0.1 * (value.detach().double().mean() - self.mean)
        return value


def not_a_number(value):
    return value * float("nan")


def steep(value):
    """Return the same value with an infinite gradient: the slope of the root at 0."""
    return value + (0 * value).sqrt()


def terminate(value):
    os.kill(os.getpid(), signal.SIGTERM)
    return value


def interrupt(value):
    os.kill(os.getpid(), signal.SIGINT)
    return value


def linger(value):
    """Wait until a signal from outside has asked the run to stop."""
    request = signal.getsignal(signal.SIGTERM).__self__
    until = time.monotonic() + HANG
    while not request.requested:
        assert time.monotonic() < until, "no signal came"
        time.sleep(0.05)
    return value


def terminate_the_second(value):
    return terminate(value) if is_second() else value


def nan_on_the_second(value):
    return not_a_number(value) if is_second() else value


def is_second():
    return os.environ.get("RANK") == "1"


def die(value):
    raise ConnectionError("as if killed")


def interrupt_at_once(value):
    raise KeyboardInterrupt


def fill(value):
    """Let no file grow beyond 4 kB from here on."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))
    return value


ACTIONS = {
    "nothing": lambda value: value,
    "nan": not_a_number,
    "steep": steep,
    "terminate": terminate,
    "interrupt": interrupt,
    "die": die,
    "interrupt_at_once": interrupt_at_once,
    "fill": fill,
    "linger": linger,
    "terminate_the_second": terminate_the_second,
    "nan_on_the_second": nan_on_the_second,
}

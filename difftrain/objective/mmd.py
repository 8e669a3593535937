"""Maximum mean discrepancy between two sets of samples under a sum of Gaussian kernels."""

import torch
from torch import Tensor

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the kernels, in multiples of b


def mmd(x: Tensor, y: Tensor, bandwidth: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the biased and the unbiased estimate of MMD^2.

    The kernel is the sum over m in `BANDWIDTHS` of ``exp(-|x - y|^2 / (m b))``. Distances are taken
    in float64 between centred samples, so that nothing cancels far from zero.

    Args:
        x: Samples [n, D].
        y: Samples [m, D].
        bandwidth: b. By default it is the mean squared distance between two different samples of x
            and y together, a constant for the gradient.

    Returns:
        (V, U), both [], in the dtype of x. U needs n, m >= 2 and has no gradient.
    """
    n, m = len(x), len(y)
    distances = squared_distances(torch.cat([x, y]))
    if bandwidth is None:
        bandwidth = mean_distance(distances)
    kernels = [torch.exp(-distances / (bandwidth * width)) for width in BANDWIDTHS]
    kernel = torch.stack(kernels).sum(0)
    within_x, within_y = kernel[:n, :n].sum(), kernel[n:, n:].sum()
    across = kernel[:n, n:].mean()
    v = within_x / n**2 + within_y / m**2 - 2 * across

    # The unbiased estimate leaves out each sample's kernel with itself.
    itself = len(BANDWIDTHS)
    mean_within_x = (within_x - n * itself) / max(1, n * (n - 1))
    mean_within_y = (within_y - m * itself) / max(1, m * (m - 1))
    u = mean_within_x + mean_within_y - 2 * across
    return v.to(x), u.detach().to(x)


def squared_distances(x: Tensor) -> Tensor:
    """Return |x_i - x_j|^2 [n, n] float64 of samples x [n, D]."""
    wide = x.double()
    wide = wide - wide.mean(0).detach()
    squares = wide.square().sum(1)
    distances = (squares[:, None] + squares[None, :] - 2 * wide @ wide.T).clamp(min=0)
    return distances.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0.0)


def mean_distance(distances: Tensor) -> Tensor:
    """Return the mean [] of the squared distances [n, n] between two different samples.

    It has no gradient.
    """
    n = len(distances)
    return (distances.detach().sum() / n / (n - 1)).clamp(min=1e-30)

"""Which timesteps of a schedule a diagnostic looks at."""

from difftrain.core.errors import InputError


def spread_timesteps(num_timesteps: int, num: int) -> list[int]:
    """Spread table indices evenly, both ends among them, as ADM's "respacing" does.

    Args:
        num_timesteps: Timesteps of the schedule.
        num: How many are wanted; a single one is the noisiest.

    Returns:
        The indices, ascending.

    Raises:
        InputError: If the schedule has fewer.
    """
    if num > num_timesteps:
        raise InputError(
            f"{num} noise levels, but the schedule has {num_timesteps} timesteps. Write at most "
            f"{num_timesteps}."
        )
    if num == 1:
        return [num_timesteps - 1]
    return [round((num_timesteps - 1) * k / (num - 1)) for k in range(num)]


def trailing_timesteps(num_timesteps: int, num: int) -> list[int]:
    """Return the table indices of diffusers' `trailing` spacing.

    Args:
        num_timesteps: Timesteps of the schedule.
        num: How many are wanted.

    Returns:
        The indices, ascending.

    Raises:
        InputError: If the schedule has fewer.
    """
    if num > num_timesteps:
        raise InputError(
            f"{num} steps, but the schedule has {num_timesteps} timesteps. Write at most "
            f"{num_timesteps}."
        )
    return sorted(round(num_timesteps - k * num_timesteps / num) - 1 for k in range(num))

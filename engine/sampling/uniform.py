"""The random number of a token: a function of (seed, position), the same on every device.

Counter-based, so that a sequence that is replayed on another worker, or stands in another batch,
draws the same tokens: u = mix(mix(seed + g) + g * (position + 1)), the top 53 bits of it, where
mix is the finaliser of splitmix64 and g its increment; int64 arithmetic that wraps around.

Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
Shape suffix: B = rows to draw for.
"""

import torch


def _signed(value: int) -> int:
    """The int64 with the bits of a uint64."""
    return value - (1 << 64) if value >= 1 << 63 else value


_INCREMENT = _signed(0x9E3779B97F4A7C15)
_FACTOR_1 = _signed(0xBF58476D1CE4E5B9)
_FACTOR_2 = _signed(0x94D049BB133111EB)


def seed_tensor(seeds: list[int], device: torch.device) -> torch.Tensor:
    """uint64 seeds as the int64 with the same bits."""
    return torch.tensor([_signed(seed % (1 << 64)) for seed in seeds], device=device)


def uniform(seed_B: torch.Tensor, position_B: torch.Tensor) -> torch.Tensor:
    """u_B in [0, 1), float64, of the token at `position_B` of its sequence.

    Args:
        seed_B: int64, see `seed_tensor`.
        position_B: int64, absolute index in the sequence of the token to be drawn.
    """
    mixed_B = _mix(_mix(seed_B + _INCREMENT) + _INCREMENT * (position_B + 1))
    return _shift_right(mixed_B, 11).double() * 2.0**-53


def _mix(x_B: torch.Tensor) -> torch.Tensor:
    x_B = (x_B ^ _shift_right(x_B, 30)) * _FACTOR_1
    x_B = (x_B ^ _shift_right(x_B, 27)) * _FACTOR_2
    return x_B ^ _shift_right(x_B, 31)


def _shift_right(x_B: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Logical shift: torch's keeps the sign."""
    return (x_B >> num_bits) & ((1 << (64 - num_bits)) - 1)

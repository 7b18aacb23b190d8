"""How a size is spread over ranks that it need not divide by."""

ALIGNMENT = 32
"""Rows and columns that kernels take at a time, and a quantisation block of most GGUF formats."""


def spread(size: int, num_parts: int, *, alignment: int = 1, what: str) -> tuple[range, ...]:
    """Cut [0, size) into ranges that differ by at most one unit; the first ones are the longer.

    A unit is `alignment` long, or the largest half, quarter, ... of it that leaves a unit for
    every part. What is left over after the last whole unit is in the last part.

    Raises:
        ValueError: there are more parts than `size`; the text says of `what`.
    """
    if not 1 <= num_parts <= size:
        raise ValueError(f"{what} ({size}) cannot be spread over {num_parts} ranks")
    while size // alignment < num_parts:
        alignment //= 2
    num_units = size // alignment
    stops = [
        (part * (num_units // num_parts) + min(part, num_units % num_parts)) * alignment
        for part in range(num_parts)
    ]
    return tuple(range(start, stop) for start, stop in zip(stops, [*stops[1:], size], strict=True))

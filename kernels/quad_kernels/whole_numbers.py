"""Arithmetic of sizes for launches: Triton's own functions of these names take ten times as long."""


def ceil_div(a: int, b: int) -> int:
    """Returns a / b, rounded up.

    Example:
        >>> ceil_div(7, 2)
        4
    """
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Returns the smallest power of two that is `n` or more, for `n` from 1 on.

    Example:
        >>> next_power_of_2(48)
        64
    """
    return 1 << (n - 1).bit_length()

"""GSR: how coarse a grid is for what it rounds.

The "grid step ratio" of a token's input or of a weight's row is the step of its grid over the standard deviation of the
values, which FRTQ (OpenReview mUB2N8L0vD) takes as its objective: rounding errors in units of the values grow with it.
"""

import torch

_TINY = torch.finfo(torch.float32).tiny


def grid_step_ratio(step: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Returns the step of each row's grid over the standard deviation of the row, 0 where all its values are alike.

    Args:
        step: distance of two grid points, `[n]`.
        rows: values that the grids round, `[n, width]`.

    Returns:
        `[n]`, in the dtype of `rows`.
    """
    deviation = rows.std(-1)
    return torch.where(deviation > _TINY, step / deviation, 0.0)

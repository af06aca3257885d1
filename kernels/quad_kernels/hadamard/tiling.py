"""How the Triton kernel divides a Hadamard transform: factors, and the tiles that they are multiplied in."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from quad_kernels.hadamard.construct import HadamardPlan, hadamard_factor
from quad_kernels.whole_numbers import next_power_of_2

MAX_SIZE = 32768
MAX_LEFT = 512
MAX_SLICES = 16
MAX_ROWS = 128  # of a tile


@dataclass(frozen=True)
class Tiling:
    """How a transform of `left * slices * right` coordinates, read as a matrix per slice, is computed.

    Attributes:
        left: order of the factor multiplied from the left: blocks, Paley orders and some of the power of two.
        slices: order of the factor applied by additions of whole tiles, a power of two.
        right: order of the factor multiplied from the right, a power of two.
        tile: rows of a tile of the result.
        tiles: tiles that cover `left`.
        depth: rows of the input multiplied at a time.
        steps: multiples of `depth` that cover `left`.
    """

    left: int
    slices: int
    right: int
    tile: int
    tiles: int
    depth: int
    steps: int

    @property
    def elements(self) -> int:
        """Coordinates of the tiles, padding included."""
        return self.tiles * self.tile * self.slices * self.right


@lru_cache(maxsize=64)
def tiling(plan: HadamardPlan, rows: int = 128, right: int = 32) -> Tiling | None:
    """The tiles of a plan, or None if the kernel does not fit it (no power of two, or too large).

    Args:
        plan: the transform.
        rows: largest number of rows of a tile, 64 or 128; the left factor takes of the power of two what fits.
        right: largest order of the right factor.
    """
    power = math.prod(plan.factors[_leading_factors(plan) :])
    left = plan.size // power
    right = min(right, power)
    if plan.size > MAX_SIZE or right < 16:
        return None
    slices = power // right
    if rows // 2 < left <= MAX_ROWS:
        rows = MAX_ROWS
    while slices > 1 and 2 * left <= rows:
        left, slices = 2 * left, slices // 2
    if left <= rows:
        tile = max(16, next_power_of_2(left))
        return Tiling(left, slices, right, tile, 1, tile, 1) if slices <= MAX_SLICES else None
    while rows < MAX_ROWS and slices > 2:
        left, slices = 2 * left, slices // 2
    if left > MAX_LEFT or slices > MAX_SLICES:
        return None
    tile = min((128, 64), key=lambda size: -(-left // size) * size)
    return Tiling(left, slices, right, tile, -(-left // tile), 64, -(-left // 64))


@lru_cache(maxsize=64)
def factors(
    plan: HadamardPlan, tiles: Tiling, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Signs of both factors: the left one transposed and filled up with zeros in `dtype`, the right one in bfloat16."""
    count = plan.size // plan.block
    with torch.inference_mode(False), torch.device("cpu"):
        left = torch.eye(count)
        for order in plan.factors[: _leading_factors(plan)]:
            left = torch.kron(left, _signs(order))
        left = torch.kron(left, _signs(tiles.left // left.shape[0]))
        padded = torch.zeros(tiles.tiles * tiles.tile, tiles.steps * tiles.depth)
        padded[: tiles.left, : tiles.left] = left.T
        return padded.to(device, dtype), _signs(tiles.right).to(device, torch.bfloat16)


def _leading_factors(plan: HadamardPlan) -> int:
    """Number of factors up to the last one that is not a power of two."""
    return max((i + 1 for i, order in enumerate(plan.factors) if order & (order - 1)), default=0)


def _signs(order: int) -> torch.Tensor:
    return hadamard_factor(order, torch.float32, torch.device("cpu")).sign()

"""Streaming Gram matrix of activations."""

import torch

_BLOCK = 256  # columns per product


class StreamingGram:
    """Accumulates X^T X over chunks of activations; the chunking does not change the result.

    Every token counts once, in any batch (QUAD, section 3.1, uses the Gram matrix of all calibration
    tokens).

    Args:
        size: number of coordinates d.
        device: device of the sum.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, activations: torch.Tensor) -> None:
        """Adds a chunk, `[..., d]`, any floating dtype; the products are float32, the sum is float64.

        Raises:
            ValueError: if a value is NaN or infinite, or the last dimension is not d.
        """
        size = self.total.shape[0]
        if activations.shape[-1] != size:
            raise ValueError(f"activations have {activations.shape[-1]} coordinates, the Gram matrix has {size}")
        x = activations.reshape(-1, size).float()
        for start in range(0, size, _BLOCK):
            # Upper block triangle only: the matrix is symmetric.
            product = x[:, start : start + _BLOCK].T @ x[:, start:]
            if not torch.isfinite(product.diagonal()).all():  # where each coordinate meets itself
                raise ValueError(_not_finite(x))
            self.total[start : start + _BLOCK, start:] += product
        self.tokens += x.shape[0]

    @classmethod
    def of(cls, total: torch.Tensor, tokens: int) -> "StreamingGram":
        """Returns a sum that was taken out: `total` `[d, d]`, float64, over `tokens` tokens."""
        gram = cls(0, total.device)
        gram.total, gram.tokens = total, tokens
        return gram

    def mean(self) -> torch.Tensor:
        """Returns X^T X / tokens, `[d, d]`, float64.

        Raises:
            ValueError: if no token was added.
        """
        return StreamingGram.of(self.total.clone(), self.tokens).mean_in_place()

    def mean_in_place(self) -> torch.Tensor:
        """Returns the same in the memory of the sum, to which nothing can be added afterwards.

        Raises:
            ValueError: if no token was added.
        """
        if self.tokens == 0:
            raise ValueError("the Gram matrix saw no calibration tokens")
        mean = self.total.div_(self.tokens)
        for start in range(0, len(mean), _BLOCK):
            stop = start + _BLOCK
            upper = mean[start:stop, start:stop].triu()
            mean[start:stop, start:stop] = upper + upper.triu(1).T
            mean[stop:, start:stop] = mean[start:stop, stop:].T
        return mean


def _not_finite(x: torch.Tensor) -> str:
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        return f"{bad} calibration activations are NaN or infinite"
    return f"calibration activations of up to {float(x.abs().max()):.2g} have an infinite square in float32"

"""A low-rank part of a weight that leaves a residual with flat rows.

What a grid that ends at theta makes of a row is at best a vector E inside of the box of magnitudes up to theta. The
loss here is the output error of that clipping alone, tr((W - A B - E) H (W - A B - E)^T) for the second moment H of the
inputs; both half-steps of a round lower it. docs/concepts/frtq.md has the proof.
"""

from dataclasses import dataclass

import torch

_BLOCK = 128  # columns whose changes are added to all others at once
_STRIP = 16  # and to those of their block
_ITERATIONS = 24  # of subspace iteration, for the first low-rank part


@dataclass
class FlatResidual:
    """A low-rank part and what clipping costs beside it.

    Attributes:
        up: A, `[out, rank]`.
        down: B, `[rank, in]`.
        losses: output error of clipping over the energy of the output, after the truncated SVD and after each round.
    """

    up: torch.Tensor
    down: torch.Tensor
    losses: list[float]


def flat_residual(
    weight: torch.Tensor, hessian: torch.Tensor, rank: int, rounds: int, quantile: float, damping: float
) -> FlatResidual:
    """Returns A and B such that the rows of W - A B are flat.

    Args:
        weight: W, `[out, in]`, float32 or float64.
        hessian: second moment of the inputs, `[in, in]`.
        rank: columns of A.
        rounds: rounds after the truncated SVD.
        quantile: theta of each row, as a quantile of the magnitudes that the truncated SVD leaves.
        damping: added to the diagonal of the Hessian, as a fraction of its mean.

    Raises:
        ValueError: if the damped Hessian is not positive definite.
    """
    moment = _damped(hessian, damping).to(weight)
    root = _cholesky(moment)
    whitened = weight @ root
    basis = _first_basis(whitened, rank)
    up, down = whitened @ basis, _unwhitened(basis, root)
    rest = weight - up @ down
    place = max(1, round(quantile * weight.shape[1]))
    bound = rest.abs().kthvalue(place, dim=1, keepdim=True).values
    inside = rest.clamp(-bound, bound)
    gradient = (rest - inside) @ moment
    energy = float(whitened.square().sum(dtype=torch.float64)) or 1.0
    losses = [_inner(rest - inside, gradient) / energy]
    for _ in range(rounds):
        inside, gradient = clip_sweep(inside, gradient, bound, moment)
        pulled = gradient + up @ (down @ moment)  # (W - E) H; all that follows has a side of `rank`
        kept = weight - inside
        basis = torch.linalg.qr(root.T @ (kept.T @ (kept @ (root @ basis)))).Q
        up, down = kept @ (root @ basis), _unwhitened(basis, root)
        gradient = pulled - up @ (down @ moment)
        losses.append(_inner(kept - up @ down, gradient) / energy)
    up, down = _balanced(up, down)
    return FlatResidual(up, down, losses)


def clip_sweep(
    inside: torch.Tensor, gradient: torch.Tensor, bound: torch.Tensor, moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns E moved once, column by column, to where tr((T - E) H (T - E)^T) is least inside of the box.

    Each column is moved to its exact minimum with the others as they are, so that the error never rises.

    Args:
        inside: E, `[out, in]`, inside of the box.
        gradient: (T - E) H for the target T, `[out, in]`.
        bound: largest magnitude in each row, `[out, 1]`.
        moment: H, `[in, in]`, positive definite.

    Returns:
        E and (T - E) H afterwards.
    """
    # A column of the weight is a row here, which lies in one piece.
    inside, gradient = inside.T.contiguous(), gradient.T.contiguous()
    bound = bound.flatten()
    for start in range(0, len(inside), _BLOCK):
        block = slice(start, start + _BLOCK)
        change = _moved(inside[block], gradient[block].clone(), bound, moment[block, block])
        gradient.addmm_(moment[:, block], change, alpha=-1)
    return inside.T, gradient.T


def _moved(inside: torch.Tensor, gradient: torch.Tensor, bound: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Moves the columns of a block, `[columns, out]`, in place, and uses their gradient up; returns the changes."""
    inverse = (1 / moment.diagonal()).tolist()
    changes = torch.empty_like(inside)
    for start in range(0, len(inside), _STRIP):
        stop = min(start + _STRIP, len(inside))
        for column in range(start, stop):
            moved = torch.add(inside[column], gradient[column], alpha=inverse[column]).clamp_(-bound, bound)
            change = torch.sub(moved, inside[column], out=changes[column])
            inside[column] = moved
            gradient[column + 1 : stop].addr_(moment[column, column + 1 : stop], change, alpha=-1)
        gradient[stop:].addmm_(moment[stop:, start:stop], changes[start:stop], alpha=-1)
    return changes


def _damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    level = hessian.diagonal().mean()
    if not level > 0:  # inputs of zeros, as of an expert without tokens: every weight counts alike
        return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return hessian + damping * level * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)


def _cholesky(moment: torch.Tensor) -> torch.Tensor:
    root, failed = torch.linalg.cholesky_ex(moment.double())
    if int(failed):
        raise ValueError("the second moment of the inputs is not positive definite; raise `damping`")
    return root.to(moment)


def _first_basis(wanted: torch.Tensor, rank: int) -> torch.Tensor:
    """Row space of the truncated SVD, `[in, rank]`, by subspace iteration from a fixed start."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(wanted.shape[1], rank, generator=generator, dtype=torch.float64).to(wanted)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(wanted.T @ (wanted @ torch.linalg.qr(basis).Q)).Q
    return basis


def _unwhitened(basis: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """B with B C = V^T, `[rank, in]`, for H = C C^T."""
    return torch.linalg.solve_triangular(root, basis.T, upper=False, left=False)


def _inner(rest: torch.Tensor, gradient: torch.Tensor) -> float:
    """tr(R H R^T) of R and R H."""
    return float((rest * gradient).sum(dtype=torch.float64))


def _balanced(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B with columns and rows of one norm each, which matters where a dtype has a small range."""
    ours, theirs = up.norm(dim=0), down.norm(dim=1)
    factor = torch.where((ours > 0) & (theirs > 0), (theirs / ours).sqrt(), 1.0)
    return up * factor, down / factor.unsqueeze(1)

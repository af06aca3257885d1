"""The residual stream's second moment, and what an outlier subspace of each rank would take out of it."""

import torch
from quad_kernels import RMSNorm, fake_quantize

from quad_modifiers.linalg import StreamingGram, extended_basis, outlier_basis, random_rotation
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.tools.inspection.measure.results import Spectrum
from quad_modifiers.tools.inspection.measure.watch import INPUT_GRIDS, watching

_TOKENS_PER_NORM = 64  # in the sample for the errors by rank
_TINY = torch.finfo(torch.float32).tiny


def measure_spectrum(
    decoder: Decoder, calibration: list[torch.Tensor], other: torch.Tensor, hidden: int, rank: int
) -> Spectrum:
    """Returns the spectrum of the stream as the readers of both norms see it, without the norms' weights.

    It does not depend on the basis: a projected checkpoint has the spectrum of its original. Where the extended basis
    has made the stream wider than the `hidden` of the original, the zeros that this adds are left out. The second
    moment is that of `calibration`, the errors by rank, `rank` among them, are those of the window `other`.
    """
    gram = StreamingGram(decoder.model.config.hidden_size, decoder.model.device)
    _run(decoder, calibration, gram.add)
    sample: list[torch.Tensor] = []
    _run(decoder, [other], lambda x: sample.append(x[:: max(1, len(x) // _TOKENS_PER_NORM)]))
    mean = gram.mean()
    energy = torch.linalg.eigvalsh(mean).flip(0).clamp(min=0)[:hidden]
    shares = (energy / energy.sum().clamp(min=_TINY)).tolist()
    return Spectrum(shares, gram.tokens, errors_by_rank(mean, torch.cat(sample), candidate_ranks(hidden, rank)))


def _run(decoder: Decoder, windows: list[torch.Tensor], see) -> None:  # type: ignore[no-untyped-def]
    normalize = RMSNorm(None, decoder.model.config.rms_norm_eps)
    watched = [(norm, lambda x: see(normalize(x.float()))) for block in decoder.blocks for norm in block.norms()]
    with watching(watched):
        for window in windows:
            decoder.run(window)


def candidate_ranks(hidden: int, rank: int) -> list[int]:
    """Returns 0, the powers of two from 8 to half the width, and `rank`."""
    powers = [2**exponent for exponent in range(3, 16) if 2**exponent <= hidden // 2]
    return sorted({0, rank, *powers})


def errors_by_rank(gram: torch.Tensor, sample: torch.Tensor, ranks: list[int]) -> list[tuple[int, float]]:
    """Returns the U-type input error at 4 bits for each rank below d, in the extended basis with a Hadamard rotation.

    The outlier directions come from the second moment `gram`, `[d, d]`; `sample` is the normalized stream, `[n, d]`.
    """
    size = len(gram)
    vectors, _ = outlier_basis(gram, max(ranks))
    rotation = random_rotation(size, "hadamard", torch.Generator().manual_seed(0)).to(gram.device)
    energy = sample.square().sum(-1).clamp(min=_TINY)  # tokens of zeros have no error
    errors = []
    for rank in ranks:
        residual = sample @ extended_basis(vectors[:, :rank], rotation)[:, rank:].to(sample)
        error = (fake_quantize(residual, INPUT_GRIDS[4]) - residual).square().sum(-1) / energy
        errors.append((rank, error.mean().item()))
    return errors

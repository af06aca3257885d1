"""Tile sizes of the Triton kernel: what a choice depends on, the candidates, and a model that ranks them unmeasured."""

from collections import Counter
from typing import NamedTuple

from quad_kernels.packing.nibbles import CHUNK

SMALLEST_TOKENS, LARGEST_TOKENS = 16, 8192


class Config(NamedTuple):
    """One way to launch the kernel.

    Attributes:
        block_m: tokens per tile.
        block_n: output channels per tile.
        block_k: inputs per step; with nibbles a multiple of their chunk.
        split_k: programs that share a tile, each with a range of inputs.
        warps: warps per program.
        stages: stages of the software pipeline.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    warps: int
    stages: int


class Problem(NamedTuple):
    """What the choice of a configuration depends on.

    Attributes:
        tokens: rounded up to a power of two, see `token_bucket`.
        outputs: output channels.
        inputs: input width.
        group: inputs that share both scales; `inputs` for one scale per token and channel.
        rank: outlier coordinates.
        nibbles: the weight is stored as nibbles, else int8.
        x_packed: the activations are packed as nibbles as well.
        zero_point: the weight has zero points.
        wide: the outliers are float32, which no tensor core multiplies exactly.
    """

    tokens: int
    outputs: int
    inputs: int
    group: int
    rank: int
    nibbles: bool
    x_packed: bool
    zero_point: bool
    wide: bool


class Device(NamedTuple):
    """What the model knows of a GPU.

    Attributes:
        processors: streaming multiprocessors.
        shared_memory: bytes that one program can have.
        hopper: its tensor cores take the left operand from registers and the right one from shared memory (wgmma).
    """

    processors: int
    shared_memory: int
    hopper: bool


# block_m, block_n, block_k, warps, stages. README.md has what the compiler makes of each.
TILES = (
    (16, 128, 256, 4, 4),
    (16, 64, 128, 4, 5),
    (32, 64, 256, 4, 4),
    (32, 128, 256, 8, 3),
    (32, 64, 128, 4, 5),
    (64, 64, 256, 4, 3),
    (64, 128, 256, 8, 3),
    (64, 128, 128, 4, 4),
    (64, 128, 128, 8, 4),
    (128, 128, 128, 8, 4),
    (128, 128, 128, 4, 4),
    (128, 128, 256, 4, 2),
    (128, 256, 128, 8, 4),
    (128, 256, 256, 8, 3),
    (256, 128, 128, 8, 4),
)
SPLITS = (1, 2, 4, 8, 16)

# The model, in cycles and bytes of one multiprocessor: it ranks configurations and predicts no time. The rate of tensor
# cores is a data sheet's, the rest is fitted to docs/benchmarks/tiles-h200.jsonl.
_MULTIPLIES = {True: 4096, False: 2048}  # int8 products per cycle, Hopper and before
_CACHE_BYTES, _MEMORY_BYTES = 30.0, 19.0  # per cycle, from the L2 cache and from memory
_LATENCY = 1100.0  # of a load, under load
_UNPACK = 0.02  # for each nibble of a step: no tensor core works meanwhile
_ALONE_STEP, _ALONE_SHARE = 100.0, 0.5  # of a step, and of its multiplication: one program waits with idle tensor cores
_ONE_AHEAD = 300.0  # of a step whose loads began only one step before
_START, _MEETING = 3400.0, 2100.0  # of a program; of the programs that share a tile
_THREADS, _REGISTERS = 2048, 65536


def token_bucket(tokens: int) -> int:
    """The next power of two, within what is distinguished."""
    return min(max(1 << (tokens - 1).bit_length(), SMALLEST_TOKENS), LARGEST_TOKENS)


def candidates(problem: Problem, device: Device) -> list[Config]:
    """Configurations that fit, the most promising first: every tile at its best split, then at its second best, and on.

    Tiles that differ are closer to each other in the model than the model is to a GPU; measure several of them.
    """
    configs = [
        Config(block_m, block_n, block_k, split, warps, stages)
        for block_m, block_n, block_k, warps, stages in TILES
        for split in SPLITS
    ]
    fitting = [config for config in configs if fits(config, problem, device)]
    ranked = sorted(fitting, key=lambda config: estimated_cycles(config, problem, device))
    seen: Counter[Config] = Counter()
    rounds = []
    for config in ranked:
        tile = config._replace(split_k=1)
        rounds.append(seen[tile])
        seen[tile] += 1
    return [config for _, config in sorted(zip(rounds, ranked, strict=True), key=lambda pair: pair[0])]


def default_config(problem: Problem, device: Device) -> Config:
    """The choice without measurements."""
    return candidates(problem, device)[0]


def fits(config: Config, problem: Problem, device: Device) -> bool:
    """Whether a program's blocks suit the groups and find room in registers and shared memory."""
    if config.block_m > problem.tokens or shared_memory(config, problem) > device.shared_memory:
        return False
    steps = -(-problem.inputs // config.block_k)
    if config.split_k > 1 and steps < 2 * config.split_k:
        return False
    grouped = problem.group < problem.inputs
    if grouped and config.block_k != CHUNK and problem.group % config.block_k:
        return False  # groups that no block divides are masked, in the smallest blocks
    return config.block_m * config.block_n <= 32 * config.warps * _most_sums(config, problem, device)


def _most_sums(config: Config, problem: Problem, device: Device) -> int:
    """Elements of a tile that a thread can hold without spilling registers, as the compiler showed (README.md)."""
    grouped = problem.group < problem.inputs
    split = config.split_k > 1
    if (grouped and problem.zero_point) or (split and not device.hopper):
        return 32
    if problem.wide:
        return 64 if config.warps > 4 else 16
    if grouped:
        return 64 if config.warps > 4 else 32
    if split or not device.hopper or (not problem.nibbles and config.block_k > CHUNK):
        return 64
    return 128


def shared_memory(config: Config, problem: Problem) -> int:
    """Bytes of one program; an upper bound."""
    outlier_bytes = 2 * (config.block_m + config.block_n) * 128 if problem.rank else 0
    output_bytes = config.block_m * config.block_n * (4 if problem.wide else 2)
    return max(config.stages * sum(_block_bytes(config, problem)), outlier_bytes, output_bytes)


def _block_bytes(config: Config, problem: Problem) -> tuple[int, int]:
    """Bytes of activations and of weights that one step loads."""
    x_bytes = config.block_m * config.block_k // (2 if problem.x_packed else 1)
    return x_bytes, config.block_n * config.block_k // (2 if problem.nibbles else 1)


def estimated_cycles(config: Config, problem: Problem, device: Device) -> float:
    """Cycles of the busiest multiprocessor by a simple model: it ranks candidates and does not predict a time."""
    tiles_m = -(-problem.tokens // config.block_m)
    tiles = tiles_m * -(-problem.outputs // config.block_n)
    steps = -(-problem.inputs // config.block_k) / config.split_k
    x_bytes, weight_bytes = _block_bytes(config, problem)
    resident = _resident(config, problem, device)
    programs = -(-tiles * config.split_k // device.processors)
    together = min(resident, programs)
    in_flight = together * (config.stages - 1) * (x_bytes + weight_bytes) / _LATENCY
    multiply = config.block_m * config.block_n * config.block_k / _MULTIPLIES[device.hopper]
    fetch = (x_bytes + weight_bytes) / min(_CACHE_BYTES, in_flight)
    if tiles_m == 1:
        fetch = max(fetch, weight_bytes / min(_MEMORY_BYTES, in_flight))
    compute = multiply
    if problem.nibbles:
        compute += _UNPACK * config.block_n * config.block_k
    if together == 1:
        compute += _ALONE_STEP + _ALONE_SHARE * multiply
    if config.stages == 2:
        compute += _ONE_AHEAD
    cycles = programs * steps * max(compute, fetch) + -(-programs // resident) * _START
    if config.split_k > 1:
        partial = config.block_n * min(problem.tokens, config.block_m) * 4
        cycles += _MEETING + programs * partial / _CACHE_BYTES + config.split_k * partial / _CACHE_BYTES
    return cycles


def _resident(config: Config, problem: Problem, device: Device) -> int:
    """Programs that a multiprocessor holds at a time."""
    threads = 32 * config.warps
    sums = config.block_m * config.block_n / threads
    weights = config.block_n * config.block_k / threads / 4
    registers = min(255.0, 55 + 1.25 * sums + 0.75 * weights)  # about what the compiler takes, see README.md
    shared = device.shared_memory // shared_memory(config, problem)
    return max(1, min(shared, _THREADS // threads, int(_REGISTERS / (registers * threads))))

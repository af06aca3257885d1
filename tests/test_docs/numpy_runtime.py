"""A runtime for the format of checkpoints, in NumPy, written from docs/reference/checkpoint-format.md alone.

It uses nothing of this project. Section names are those of the page.
"""

from __future__ import annotations

import math
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

Section = dict[str, Any]


# Packing


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Fields of int32 words along the last axis, `[..., count]`."""
    per_word = 32 // bits
    index = np.arange(count)
    shift = (bits * (index % per_word)).astype(np.uint32)
    fields = (words.view(np.uint32)[..., index // per_word] >> shift) & np.uint32(2**bits - 1)
    return fields.astype(np.int64) - 2 ** (bits - 1)


# The transform


def prime_power(q: int) -> tuple[int, int] | None:
    if q < 2:
        return None
    p = next(p for p in range(2, q + 1) if q % p == 0)
    e = round(math.log(q, p))
    return (p, e) if p**e == q else None


def paley_construction(n: int) -> tuple[int, int] | None:
    """Number of the construction and q."""
    if prime_power(n - 1) and (n - 1) % 4 == 3:
        return 1, n - 1
    if n % 2 == 0 and prime_power(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        return 2, n // 2 - 1
    return None


def times(a: tuple[int, ...], b: tuple[int, ...], t: tuple[int, ...], p: int) -> tuple[int, ...]:
    """Product of two elements of GF(p^e) modulo x^e + t_(e-1) x^(e-1) + ... + t_0, coefficients from c_0."""
    e = len(t)
    out = list(np.convolve(a, b) % p) + [0] * e
    for degree in range(2 * e - 2, e - 1, -1):
        for i in range(e):
            out[degree - e + i] = (out[degree - e + i] - out[degree] * t[i]) % p
        out[degree] = 0
    return tuple(int(c) for c in out[:e])


def irreducible(t: tuple[int, ...], p: int) -> bool:
    """No monic polynomial of degree 1 to e/2 divides it: tested by multiplying all pairs of monic factors."""
    e = len(t)
    for low in range(1, e // 2 + 1):
        for a, b in product(product(range(p), repeat=low), product(range(p), repeat=e - low)):
            if tuple(np.convolve((*a, 1), (*b, 1)) % p) == (*t, 1):
                return False
    return True


def character(q: int) -> tuple[list[tuple[int, ...]], set[tuple[int, ...]], int]:
    """Elements in order, non-zero squares, and p."""
    p, e = prime_power(q) or (0, 0)
    t = next(t for t in product(range(p), repeat=e) if irreducible(t, p))
    elements = [tuple(i // p**j % p for j in range(e)) for i in range(q)]
    return elements, {times(a, a, t, p) for a in elements if any(a)}, p


def paley(n: int) -> np.ndarray:
    construction, q = paley_construction(n) or (0, 0)
    elements, squares, p = character(q)
    chi = lambda c: 0 if not any(c) else 1 if c in squares else -1  # noqa: E731
    core = np.zeros((q + 1, q + 1), dtype=np.int64)
    core[0, 1:] = 1
    core[1:, 0] = -1 if construction == 1 else 1
    core[1:, 1:] = [[chi(tuple((x - y) % p for x, y in zip(a, b, strict=True))) for b in elements] for a in elements]
    identity = np.eye(q + 1, dtype=np.int64)
    if construction == 1:
        return core + identity
    return np.kron(core, [[1, 1], [1, -1]]) + np.kron(identity, [[1, -1], [-1, -1]])


def pow_factors(n: int) -> tuple[int, ...]:
    if n <= 128:
        return (n,)
    e = n.bit_length() - 1
    return (*pow_factors(2 ** ((e + 1) // 2)), *pow_factors(2 ** (e // 2)))


def factors(m: int) -> tuple[int, ...] | None:
    e = (m & -m).bit_length() - 1
    odd = m >> e
    if odd == 1:
        return pow_factors(m)
    if m % 4:
        return None
    for h in range(2, e + 1):
        if odd << h <= 512 and paley_construction(odd << h):
            return (odd << h, *(pow_factors(2 ** (e - h)) if e > h else ()))
    for n in range(4, min(512, m - 1) + 1, 4):
        if n & (n - 1) and m % n == 0 and paley_construction(n):
            rest = factors(m // n)
            if rest is not None:
                return (n, *rest)
    return None


def transform(k: int) -> np.ndarray:
    """M_k, float64."""
    m = next(m for m in range(k, 0, -1) if k % m == 0 and factors(m) is not None)
    block = np.ones((1, 1))
    for n in factors(m) or ():
        matrix = np.ones((1, 1))
        while n & (n - 1) == 0 and len(matrix) < n:
            matrix = np.kron([[1, 1], [1, -1]], matrix)
        block = np.kron(block, (matrix if n & (n - 1) == 0 else paley(n)) / np.sqrt(n))
    return np.kron(np.eye(k // m), block)


# Inference


def quantize(x: np.ndarray, entry: Section) -> tuple[np.ndarray, np.ndarray]:
    """Integers and one step per coordinate; all in float32."""
    groups = x.reshape(len(x), -1, entry["group_size"] or x.shape[1])
    low = np.float32(-(2 ** (entry["bits"] - 1)))
    levels = np.float32(2 ** entry["bits"] - 1)
    largest = np.abs(groups).max(-1, keepdims=True)
    step = largest * np.float32(entry["clip_ratio"]) / (levels / 2)
    step = np.where(step < 2.0**-126, np.float32(0), step)
    if not entry.get("symmetric", True):
        ends = np.minimum(groups.min(-1, keepdims=True), 0), np.maximum(groups.max(-1, keepdims=True), 0)
        least, most = (end * np.float32(entry["clip_ratio"]) for end in ends)
        step = most / levels - least / levels
        step = np.where(step < 2.0**-126, np.float32(0), step)
        low = -np.clip(np.rint(np.divide(-least, step, out=np.zeros_like(step), where=step > 0)), 0, levels)
    factor = np.ones_like(step)
    if entry.get("sub_scale_bits"):
        most = np.float32(2 ** entry["sub_scale_bits"] - 1)
        scale = step.max(1, keepdims=True) / most
        scale = np.where(scale < 2.0**-126, np.float32(0), scale)
        quotient = np.divide(step, scale, out=np.zeros_like(step), where=scale > 0)
        factor, step = np.clip(np.rint(quotient), np.float32(1), most), np.broadcast_to(scale, step.shape)
    divisor = factor * step
    quotient = np.divide(groups, divisor, out=np.zeros_like(groups), where=divisor > 0)
    integers = factor * np.clip(np.rint(quotient), low, low + levels)
    return integers.reshape(x.shape), np.broadcast_to(step, groups.shape).reshape(x.shape)


def e2m1(x: np.ndarray) -> np.ndarray:
    """Twice the nearest 4-bit numbers, of half of `x`."""
    magnitudes = np.array([0, 1, 2, 3, 4, 6, 8, 12], dtype=np.float32)
    distance = np.abs(np.abs(x)[..., None] - magnitudes)
    nearest = distance == distance.min(-1, keepdims=True)
    even = nearest & (np.arange(8) % 2 == 0)
    code = np.where(even.any(-1), even.argmax(-1), nearest.argmax(-1))
    return np.sign(x) * magnitudes[code]


def four_bits(x: np.ndarray) -> np.ndarray:
    fraction, exponent = np.frexp(x)
    return np.ldexp(np.rint(fraction * 16) / 16, exponent).astype(np.float32)


def cost(groups: np.ndarray, step: np.ndarray) -> np.ndarray:
    quotient = np.divide(groups, step, out=np.zeros_like(groups), where=step > 0)
    errors = np.rint(32 * np.clip(quotient - e2m1(np.clip(quotient, -12, 12)), -4, 4))
    return (errors**2).sum(-1, keepdims=True).astype(np.float32) * step * step


def quantize_float(x: np.ndarray, entry: Section) -> tuple[np.ndarray, np.ndarray]:
    """As `quantize`."""
    groups = x.reshape(len(x), -1, entry["group_size"])
    largest = np.abs(groups).max(-1, keepdims=True) * np.float32(entry["clip_ratio"])
    if entry["number_format"] == "mxfp4":
        step = np.zeros_like(largest)
        np.exp2(np.floor(np.log2(largest / 1.75 * 2, where=largest > 0, out=step)) - 3, where=largest > 0, out=step)
    else:
        step = four_bits(largest / np.float32(12))
        if entry["four_over_six"]:
            four = four_bits(largest / np.float32(8))
            step = np.where(cost(groups, four) < cost(groups, step), four, step)
    step = np.where(step < 2.0**-126, np.float32(0), step)
    integers = e2m1(np.divide(groups, step, out=np.zeros_like(groups), where=step > 0))
    return integers.reshape(x.shape), np.broadcast_to(step, groups.shape).reshape(x.shape)


def float_weight(name: str, tensors: dict[str, np.ndarray], entry: Section) -> tuple[np.ndarray, np.ndarray]:
    """Twice the numbers, and half of what they are multiplied by."""
    packed = tensors[f"{name}.residual.weight_packed"]
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7] * np.where(codes & 8, -1, 1)
    scale = tensors[f"{name}.residual.weight_scale"].astype(np.float32)
    if entry["weight"]["number_format"] == "mxfp4":
        step = np.exp2(scale - 127)
    else:
        step = scale / tensors[f"{name}.residual.weight_global_scale"]
    return 2 * numbers, step / 2


def linear(x: np.ndarray, name: str, tensors: dict[str, np.ndarray], entry: Section) -> np.ndarray:
    """One linear on `[tokens, in_features]`, float32."""
    is_outlier = np.arange(entry["in_features"]) % entry["block"] < entry["outliers_per_block"]
    x_r = np.where(is_outlier, np.float32(0), x) if entry["keep_width"] else x[:, ~is_outlier]
    k = x_r.shape[1]
    if entry["hadamard"]:
        x_r = (x_r @ transform(k)).astype(np.float32)
    steps = np.ones_like(x_r)
    if entry["input"] is not None:
        is_float = entry["input"].get("number_format", "int") != "int"
        x_r, steps = (quantize_float if is_float else quantize)(x_r, entry["input"])
    if entry["weight"] is None:
        y = (x_r * steps) @ tensors[f"{name}.residual.weight"].T
    elif entry["weight"].get("number_format", "int") != "int":
        weight, scale = float_weight(name, tensors, entry)
        y = (x_r * steps) @ (weight * scale.repeat(k // scale.shape[1], axis=1)).T
    else:
        bits, out = entry["weight"]["bits"], entry["out_features"]
        assert tensors[f"{name}.residual.weight_shape"].tolist() == [out, k]
        weight = unpack(tensors[f"{name}.residual.weight_packed"], bits, k)
        scale = tensors[f"{name}.residual.weight_scale"]
        columns = k // scale.shape[1]
        if not entry["weight"]["symmetric"]:
            packed = tensors[f"{name}.residual.weight_zero_point"].T.copy()
            weight = weight - unpack(packed, bits, out).T.repeat(columns, axis=1)
        if entry["weight"].get("sub_scale_bits"):
            packed = tensors[f"{name}.residual.weight_sub_scale"].T.copy()
            factors = unpack(packed, 4, out).T + 8
            weight = weight * factors.repeat(k // factors.shape[1], axis=1)
        if entry["input"] and scale.shape[1] == 1 and (steps == steps[:, :1]).all():
            total = x_r.astype(np.int64) @ weight.T
            y = total.astype(np.float32) * steps[:, :1] * scale[:, 0]
        else:
            y = (x_r * steps) @ (weight.astype(np.float32) * scale.repeat(columns, axis=1)).T
    if is_outlier.any():
        y = y + outlier_product(x[:, is_outlier], name, tensors, entry)
    if entry["bias"]:
        y = y + tensors[f"{name}.bias"]
    return y.astype(np.float32)


def outlier_product(x_o: np.ndarray, name: str, tensors: dict[str, np.ndarray], entry: Section) -> np.ndarray:
    if entry.get("outlier") is None:
        return x_o @ tensors[f"{name}.outlier.weight"].T
    shape = (entry["out_features"], x_o.shape[1])
    assert tuple(tensors[f"{name}.outlier.weight_shape"]) == shape
    weight = unpack(tensors[f"{name}.outlier.weight_packed"], 8, shape[1])
    scale = tensors[f"{name}.outlier.weight_scale"]
    if entry["outlier"]["input_bits"] is None:
        return x_o @ (weight.astype(np.float32) * scale).T
    assert entry["weight"] is not None
    integers, steps = quantize(x_o, {"bits": 8, "clip_ratio": 1.0, "group_size": None})
    total = integers.astype(np.int64) @ weight.T
    return total.astype(np.float32) * steps[:, :1] * scale[:, 0]


# Tensors


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """NumPy has no dtype of 8 floating-point bits; float32 holds them."""
    read = load_file(file)
    return {
        name: (tensor.float() if tensor.dtype == torch.float8_e4m3fn else tensor).numpy()
        for name, tensor in read.items()
    }


def expected_shapes(name: str, entry: Section) -> dict[str, tuple[int, ...]]:
    out, blocks = entry["out_features"], entry["in_features"] // entry["block"]
    r = entry["outliers_per_block"] * blocks
    k = entry["in_features"] if entry["keep_width"] else entry["in_features"] - r
    shapes: dict[str, tuple[int, ...]] = {}
    if entry["weight"] is None:
        shapes["residual.weight"] = (out, k)
    elif entry["weight"].get("number_format", "int") != "int":
        shapes["residual.weight_packed"] = (out, k // 2)
        shapes["residual.weight_scale"] = (out, k // entry["weight"]["group_size"])
        if entry["weight"]["number_format"] == "nvfp4":
            shapes["residual.weight_global_scale"] = (1,)
    else:
        bits, size = entry["weight"]["bits"], entry["weight"]["group_size"]
        groups = k // size if size else 1
        shapes["residual.weight_packed"] = (out, math.ceil(k * bits / 32))
        two_levels = entry["weight"].get("sub_scale_bits")
        shapes["residual.weight_scale"] = (out, 1 if two_levels else groups)
        if two_levels:
            shapes["residual.weight_sub_scale"] = (math.ceil(out / 8), groups)
        shapes["residual.weight_shape"] = (2,)
        if not entry["weight"]["symmetric"]:
            shapes["residual.weight_zero_point"] = (math.ceil(out * bits / 32), groups)
    if entry.get("outlier") is not None:
        packed = {"weight_packed": (out, math.ceil(r / 4)), "weight_scale": (out, 1), "weight_shape": (2,)}
        shapes |= {f"outlier.{key}": shape for key, shape in packed.items()}
    elif r:
        shapes["outlier.weight"] = (out, r)
    if entry["bias"]:
        shapes["bias"] = (out,)
    return {f"{name}.{key}": shape for key, shape in shapes.items()}


def entry_of(section: Section, name: str) -> Section:
    """The entry of `linears` that holds for a linear."""
    role, layer = name.rpartition(".")[2], int(re.findall(r"layers\.(\d+)\.", name)[0])
    entry = dict(section["linears"][role])
    for each in section.get("overrides", []):
        if each["role"] == role and layer in each["layers"]:
            entry |= {"weight": each["weight"], "input": each["input"]}
    return entry

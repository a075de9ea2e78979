"""The oracle of methods whose levels or thresholds are not evenly spaced, see `tests.oracle`."""

from __future__ import annotations

import itertools

import numpy as np

from tests.oracle import ONE, Array, Groups, Result, sign, to_nearest, uniform_jumps, uniform_round


def lq_initial_basis(bits: int, count: int, *, fan: int | None = None) -> Array:
    """[bits, g]: 2^i * 0.6745 * 2 / 2^(bits-1) for activations, sqrt(2 / fan) for 2 in weights."""
    width = 2.0 if fan is None else np.sqrt(2.0 / fan)
    entry = 2.0 ** np.arange(bits) * 0.6745 * width / 2.0 ** (bits - 1)
    return np.repeat(entry[:, None], count, axis=1).astype(np.float64)


def lq_codes(bits: int, half_range: bool) -> Array:
    """All codes [2^bits, bits] with entries {0, 1} or {-1, +1}."""
    low = 0.0 if half_range else -1.0
    return np.array(list(itertools.product((low, 1.0), repeat=bits)))


def _lq_row(row: Array, basis: Array, half_range: bool) -> tuple[Array, Array, Array, float]:
    """One group: quantized row, the elements' codes, their distance to a threshold, the top level."""
    codes = lq_codes(len(basis), half_range)
    levels = codes @ basis
    order = np.argsort(levels, kind="stable")
    levels, codes = levels[order], codes[order]
    thresholds = (levels[1:] + levels[:-1]) / 2
    index = (row[:, None] > thresholds).sum(axis=1)
    jumps = np.append(thresholds, levels[-1])
    return levels[index], codes[index], to_nearest(row, jumps) / np.abs(levels).max(), levels[-1]


def lq(
    x: Array, gy: Array, *, basis: Array, half_range: bool, groups: Groups = ONE, activation: bool
) -> Result:
    """LQ-Nets with midpoint thresholds; `basis` is [bits, g].

    Activations: straight-through below the top level. Weights: straight-through everywhere.
    """
    rows = groups.rows(x)
    y, distance, below = np.empty_like(rows), np.empty_like(rows), np.empty(rows.shape, dtype=bool)
    for g, row in enumerate(rows):
        y[g], _, distance[g], top = _lq_row(row, basis[:, g], half_range)
        below[g] = row < top
    gx = gy * _unrows(below.astype(np.float64), x, groups) if activation else gy.copy()
    return Result(_unrows(y, x, groups), gx, {}, _unrows(distance, x, groups))


def lq_least_squares(
    x: Array, *, basis: Array, half_range: bool, groups: Groups = ONE, activation: bool
) -> Array:
    """(B^T B)^-1 B^T x of the current codes per group, regularised: [bits, g].

    Activations: a zero diagonal entry becomes 1e-5. Weights: a diagonal entry d becomes
    (d + 1e-4) * 1.000001 and 1e-4 * basis is added to B^T x.
    """
    best = np.empty_like(basis)
    for g, row in enumerate(groups.rows(x)):
        _, codes, _, _ = _lq_row(row, basis[:, g], half_range)
        normal, target = codes.T @ codes, codes.T @ row
        diagonal = np.diag(normal).copy()
        if activation:
            diagonal[diagonal == 0] = 1e-5
        else:
            diagonal = (diagonal + 1e-4) * 1.000001
            target = target + 1e-4 * basis[:, g]
        np.fill_diagonal(normal, diagonal)
        best[:, g] = np.linalg.solve(normal, target)
    return best


def lq_blend(basis: Array, new: Array) -> Array:
    """The basis after a training step: 0.9 * basis + 0.1 * new."""
    return 0.9 * basis + 0.1 * new


def lq_running_mean(basis: Array, new: Array, iteration: int) -> Array:
    """The basis after training step `iteration` (from 1) with the keyword `custom-update`."""
    return basis + (new - basis) / iteration


def _unrows(rows: Array, x: Array, groups: Groups) -> Array:
    """The inverse of `Groups.rows` for a tensor of the shape of x."""
    moved = np.moveaxis(x, groups.axis, 0).shape
    return np.moveaxis(rows.reshape(moved), 0, groups.axis)


def apot_levels(levels: int, half_range: bool) -> Array:
    """The levels for a clip value of 1 (paper, equation 5 with k = 2, and its odd number of bits).

    Term i of n: 0, or 2^-i, 2^-(i + n), 2^-(i + 2n); an odd bit has 0 or 2^-2n, and the terms' last powers follow it.
    """
    bits = int(np.ceil(np.log2(levels))) - (not half_range)
    n = bits // 2
    terms = [[0.0, 2.0**-i, 2.0 ** -(i + n), 2.0 ** -(i + 2 * n + bits % 2)] for i in range(n)]
    if bits % 2:
        terms.append([0.0, 2.0 ** -(2 * n)])
    sums = np.unique([sum(choice) for choice in itertools.product(*terms)])
    sums = sums / sums.max()
    return sums if half_range else np.unique(np.concatenate([-sums, sums]))


def apot(
    x: Array,
    gy: Array,
    *,
    clip_val: Array,
    levels: int,
    half_range: bool,
    groups: Groups = ONE,
    factor: float = 1.0,
) -> Result:
    """The nearest sum to x / c, times c: dq/dc is the level minus x / c inside, the end outside (paper, equation 7)."""
    c = groups.spread(np.abs(clip_val), x)
    table = apot_levels(levels, half_range)
    ratio = x / c
    level = table[np.abs(np.clip(ratio, table[0], 1)[..., None] - table).argmin(axis=-1)]
    inside = (ratio >= table[0]) & (ratio <= 1)
    grad = groups.sum(gy * np.where(inside, level - ratio, level)) * sign(clip_val) * factor
    jumps = np.concatenate([(table[1:] + table[:-1]) / 2, table[[0, -1]]])
    return Result(c * level, gy * inside, {"clip_val": grad}, to_nearest(ratio, jumps))


def fatnn_half(x: Array, gy: Array, *, alphas: list[Array], groups: Groups = ONE) -> Result:
    """The sum over i of round(clamp((x - sum_{j<i} 1/a_j) * a_i, 0, 1)), a_i = |alpha_i|, L - 1 of them."""
    slopes = [groups.spread(np.abs(alpha), x) for alpha in alphas]
    y, gx = np.zeros_like(x), np.zeros_like(x)
    grads = [np.zeros_like(x) for _ in slopes]
    jumps = []
    start = np.zeros_like(slopes[0])
    for i, a in enumerate(slopes):
        position = (x - start) * a
        inside = (position >= 0) & (position <= 1)
        y += np.round(np.clip(position, 0, 1))
        gx += gy * inside * a
        grads[i] += gy * inside * (x - start)
        for j in range(i):  # the start holds 1 / a_j: d position / d a_j = a_i / a_j^2
            grads[j] += gy * inside * a / slopes[j] ** 2
        jumps += [start, start + 0.5 / a, start + 1 / a]
        start = start + 1 / a
    distance = np.min([np.abs(x - jump) for jump in jumps], axis=0) / start
    named = {f"alpha{i}": groups.sum(grad) * sign(alphas[i]) for i, grad in enumerate(grads)}
    return Result(y, gx, named, distance)


def n2uq(
    x: Array,
    gy: Array,
    *,
    clip_val: Array,
    start: Array,
    widths: list[Array],
    half_range: bool,
    groups: Groups = ONE,
    factor: float = 1.0,
) -> Result:
    """c * l(k / n): k of n ramps of width |w_i| in units of c, the first from `start`, are passed by more than half.

    Backwards k is the height of the ramps (paper, section 3.2): in ramp i, that begins at d, dk/dr = 1 / |w_i|,
    dk/dd = -1 / |w_i| and dk/dw_i = -(r - d) / w_i^2; d moves with `start` and with all widths before it.
    """
    n, floor = len(widths), 1e-3
    c, begin = groups.spread(np.abs(clip_val), x), groups.spread(start, x)
    ratio = x / c
    edges = [begin]
    for width in widths:
        edges.append(edges[-1] + groups.spread(np.maximum(np.abs(width), floor), x))
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    k = np.sum([ratio > middle for middle in middles], axis=0)
    unit = (1.0 if half_range else 2.0) / n
    level = k * unit - (0.0 if half_range else 1.0)
    slope, own = np.zeros_like(x), [np.zeros_like(x) for _ in widths]
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = (ratio > low) & (ratio <= high)
        slope += inside / (high - low)
        own[i] -= inside * (ratio - low) / (high - low) ** 2
        for before in own[:i]:
            before -= inside / (high - low)
    grads = {
        "clip_val": groups.sum(gy * (level - unit * slope * ratio)) * sign(clip_val),
        "start": groups.sum(-gy * c * unit * slope),
    } | {f"width{i}": groups.sum(gy * c * unit * each) * sign(widths[i]) for i, each in enumerate(own)}
    jumps = np.min([np.abs(ratio - jump) for jump in (*edges, *middles)], axis=0)
    return Result(c * level, gy * unit * slope, {name: grad * factor for name, grad in grads.items()}, jumps)


def n2uq_weight(w: Array, gy: Array, *, levels: int, groups: Groups = ONE) -> Result:
    """The nearest of evenly spaced levels in [-c, c], c = 2 (L - 1) / L * mean|w|; the gradient passes unchanged."""
    c = groups.spread(2 * (levels - 1) / levels * np.abs(groups.rows(w)).mean(axis=1), w)
    y = uniform_round(w, c, levels, False)
    return Result(y, gy, {}, to_nearest(w / c, uniform_jumps(levels, False)))


def fatnn_ternary(x: Array, gy: Array, *, alphas: list[Array], groups: Groups = ONE) -> Result:
    """round(clamp(x * a_0, -1, 0)) + round(clamp(x * a_1, 0, 1)), a_i = |alpha_i|."""
    negative, positive = (groups.spread(np.abs(alpha), x) for alpha in alphas)
    below, above = x * negative, x * positive
    in_below, in_above = (below >= -1) & (below <= 0), (above >= 0) & (above <= 1)
    y = np.round(np.clip(below, -1, 0)) + np.round(np.clip(above, 0, 1))
    gx = gy * (in_below * negative + in_above * positive)
    grads = {
        "alpha0": groups.sum(gy * in_below * x) * sign(alphas[0]),
        "alpha1": groups.sum(gy * in_above * x) * sign(alphas[1]),
    }
    jumps = [np.zeros_like(negative), -0.5 / negative, -1 / negative, 0.5 / positive, 1 / positive]
    distance = np.min([np.abs(x - jump) for jump in jumps], axis=0) * np.minimum(negative, positive)
    return Result(y, gx, grads, distance)

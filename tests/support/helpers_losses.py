"""The terms of 2D-VoCo as plain loops over Python numbers (float64), written from the formulas."""

import math

EPS = 1e-6


def slow_cosine(u, v):
    norm = math.sqrt(sum(a * a for a in u)) * math.sqrt(sum(b * b for b in v))
    return sum(a * b for a, b in zip(u, v, strict=True)) / norm if norm else 0.0


def slow_similarity(first, second):
    return [[min(1.0, max(0.0, slow_cosine(u, v))) for v in second] for u in first]


def slow_position_loss(s, y):
    near = weight = far = apart = 0.0
    for row_s, row_y in zip(s, y, strict=True):
        for a, b in zip(row_s, row_y, strict=True):
            near -= b * math.log(1 - abs(b - a) + EPS)
            weight += b
            if b == 0:
                far += a * a
                apart += 1
    return near / (weight + EPS) + far / (apart + EPS)


def slow_softmax_position_loss(cosines, overlap, temperature):
    loss = 0.0
    for row, labels in zip(cosines, overlap, strict=True):
        powers = [math.exp(value / temperature) for value in row]
        for power, label in zip(powers, labels, strict=True):
            loss -= label / (sum(labels) + EPS) * math.log(power / sum(powers))
    return loss / len(cosines)


def slow_regularisation(z):
    pairs = [
        max(0.0, slow_cosine(z[k], z[m])) ** 2 for k in range(len(z)) for m in range(k + 1, len(z))
    ]
    return sum(pairs) / len(pairs)


def slow_nt_xent(first, second, temperature):
    views, N = [*first, *second], len(first)
    loss = 0.0
    for i, view in enumerate(views):
        alike = [math.exp(slow_cosine(view, other) / temperature) for other in views]
        loss -= math.log(alike[(i + N) % (2 * N)] / sum(alike[:i] + alike[i + 1 :]))
    return loss / (2 * N)


def slow_overlap(random, base):
    """Shares of boxes (starts, then stops of each axis) in each other, by intervals."""
    table = []
    for r in random:
        n, row = len(r) // 2, []
        for k in base:
            share = 1.0
            for axis in range(n):
                shared = min(r[n + axis], k[n + axis]) - max(r[axis], k[axis])
                share *= max(0.0, shared) / (r[n + axis] - r[axis])
            row.append(share)
        table.append(row)
    return table

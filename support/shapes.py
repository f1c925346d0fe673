"""The figures of the built-in data set, drawn by numpy."""
import math

import numpy as np
import torch


def rectangle(u, v, width, height):
    return np.maximum(abs(u) - width, abs(v) - height)


def sides(u, v, count):
    """How far (u, v) lies in the directions of the `count` sides of a regular polygon."""
    return [u * COSINE[angle] + v * SINE[angle] for angle in range(0, 360, 360 // count)]


def length(u, v):
    return np.sqrt(u * u + v * v)


# The sine and the cosine of whole degrees.  To draw the same bits on every processor, we round them
# to 6 decimals, because libraries differ in the last bits; all else is what IEEE 754 fixes: + - * /
# and square roots.
SINE = np.array([round(math.sin(math.radians(angle)), 6) for angle in range(360)], np.float32)
COSINE = np.roll(SINE, -90)

# Roughly the signed distance from the points (u, v) to the outline of a figure of radius 1; it is
# negative inside the figure.
SHAPES = {
    "bar": lambda u, v: rectangle(u, v, 1, 0.3),
    "cross": lambda u, v: np.minimum(rectangle(u, v, 1, 0.3), rectangle(u, v, 0.3, 1)),
    "disc": lambda u, v: length(u, v) - 0.9,
    "frame": lambda u, v: abs(rectangle(u, v, 0, 0) - 0.65) - 0.15,
    "half disc": lambda u, v: np.maximum(length(u, v) - 1, -v),
    "ring": lambda u, v: abs(length(u, v) - 0.8) - 0.2,
    "square": lambda u, v: rectangle(u, v, 0.75, 0.75),
    "star": lambda u, v: np.sort(sides(u, v, 5), axis=0)[-2] - COSINE[72],  # a tip: over one side
    "triangle": lambda u, v: np.max(sides(u, v, 3), axis=0) - 0.5,
    "two discs": lambda u, v: length(abs(u) - 0.6, v) - 0.4,
}


def draw_shapes(count, seed):
    """Draw figures, as many of each class: uint8 (count, 3, 32, 32) and labels (count,).

    Place, size, rotation and both colours vary, so no single pixel says anything about the class.
    """
    rng = np.random.default_rng(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * rng.random(shape, dtype=np.float32)

    labels = rng.permutation(np.arange(count) % len(SHAPES))
    radius = uniform(10, 14, count, 1, 1)                                    # pixels
    middle = 16 + uniform(-1, 1, 2, count, 1, 1) * (16 - radius)
    angle = rng.integers(0, 360, (count, 1, 1))                              # degrees

    # The two colours differ by 0.3 or more in each of red, green and blue.
    back = uniform(0, 1, count, 3, 1, 1)
    fore = back + uniform(0.3, 0.7, count, 3, 1, 1)
    fore -= np.floor(fore)

    # Each pixel's place on the axes of the figure, where its radius is 1; all (count, H, W).
    y, x = (np.mgrid[:32, :32].astype(np.float32) + 0.5)[:, None] - middle
    u = (x * COSINE[angle] + y * SINE[angle]) / radius
    v = (y * COSINE[angle] - x * SINE[angle]) / radius
    outside = np.empty_like(u)                                              # > 0 outside the figure
    for label, distance in enumerate(SHAPES.values()):
        mine = labels == label
        outside[mine] = distance(u[mine], v[mine])

    # Mix the colours by the share of the pixel that the figure covers, and add a little noise.
    images = (fore - back) * np.clip(0.5 - outside * radius, 0, 1)[:, None]
    images += back
    images += uniform(-0.05, 0.05, *images.shape)
    images = np.rint(255 * images.clip(0, 1, out=images), out=images)
    return torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels)

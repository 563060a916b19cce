"""Draws slides for the demo, so that Slideway can be tried without any patient's tissue.

A drawn slide looks like H&E: glass, islands of tissue, stroma with fibres, glands or solid nests of
epithelium, lymphocytes, fat, vessels, and what spoils real slides: pen, dust, a tear. Colour is made as in
real tissue: each pixel has an amount of haematoxylin and of eosin, and light falls off with their optical
density (Beer-Lambert). The seed decides everything; `seed % 3` picks how cellular the tissue is, so that
slides differ in haematoxylin.

    python make_slides.py --seed 1 --out slide.tiff [--size 8192x6144] [--mpp 0.5]

The file is a pyramidal tiled JPEG TIFF: levels of 1, 1/4 and 1/16, tiles of 256 px, µm/px in its resolution
tags. Needs numpy and Pillow only. Memory grows with the low-resolution plan only (4 µm a pixel).
"""

from __future__ import annotations

import argparse
import io
import os
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

Field = npt.NDArray[np.floating]
"""Single precision, or double where that costs nothing."""

TILE = 256
BLOCK = 512
REDUCTION = 4
LEVELS = 3
PLAN_UM = 4.0
"""µm a pixel of the plan, the low-resolution fields that say what is where."""
TEXTURE = 1024

# Optical density per unit of stain for red, green, blue: haematoxylin after Ruifrok and Johnston (2001),
# an eosin a little warmer than theirs, as most laboratories' is.
HAEMATOXYLIN = np.array([0.65, 0.70, 0.29], np.float32)
EOSIN = np.array([0.12, 0.82, 0.38], np.float32)
PENS = {
    "blue": np.array([1.5, 0.95, 0.25], np.float32),
    "green": np.array([1.5, 0.45, 1.05], np.float32),
    "black": np.array([1.5, 1.5, 1.4], np.float32),
}


@dataclass(frozen=True)
class Tissue:
    """What distinguishes one slide's tissue from another's. Lengths in µm."""

    gland_spacing: float
    gland_radius: tuple[float, float]
    solid: float
    """Share of glands that are solid nests."""
    rows: int
    """Layers of nuclei in a gland's wall."""
    lymphocytes: float
    fat: float
    fibroblasts: float
    pen: str


TISSUES = (
    Tissue(155, (46, 74), 0.6, 2, 0.62, 0.02, 0.75, "black"),  # crowded: nests and atypical glands
    Tissue(240, (42, 80), 0.0, 1, 0.2, 0.2, 0.45, "blue"),  # quiet: few glands, fat
    Tissue(185, (46, 84), 0.15, 2, 0.42, 0.1, 0.6, "green"),  # between
)


# --- noise ------------------------------------------------------------------------------------------------


def resized(field: Field, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> Field:
    """`field` (or the part in `box`) at `size` (width, height), bicubic."""
    image = Image.fromarray(field).resize(size, Image.Resampling.BICUBIC, box=box)
    return np.asarray(image, np.float32)


def noise(rng: np.random.Generator, width: int, height: int, scale: float, octaves: int = 4) -> Field:
    """Fractal noise of about zero mean and unit variance; `scale` is the largest feature in pixels."""
    total = np.zeros((height, width), np.float32)
    weight = 1.0
    power = 0.0
    for _ in range(octaves):
        columns = int(np.ceil(width / scale)) + 3
        rows = int(np.ceil(height / scale)) + 3
        grid = rng.standard_normal((rows, columns)).astype(np.float32)
        x, y = 1 + rng.random(), 1 + rng.random()
        box = (x, y, min(x + width / scale, columns), min(y + height / scale, rows))
        total += weight * resized(grid, (width, height), box)
        power += weight * weight * 0.6
        weight *= 0.5
        scale = max(scale / 2, 1.0)
    return total / np.float32(np.sqrt(power))


def texture(rng: np.random.Generator, length: float, width: float) -> Field:
    """A TEXTURE² tile that repeats without seams: noise of unit variance, features `length` × `width` px."""
    y = np.fft.fftfreq(TEXTURE)[:, None]
    x = np.fft.rfftfreq(TEXTURE)[None, :]
    spectrum = np.fft.rfft2(rng.standard_normal((TEXTURE, TEXTURE)))
    spectrum *= np.exp(-0.5 * ((x * length * 2.2) ** 2 + (y * width * 2.2) ** 2))
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, s=(TEXTURE, TEXTURE))
    return (field / field.std()).astype(np.float32)


def smoothstep(low: float, high: float, value: Field) -> Field:
    """0 up to `low`, 1 from `high`, smooth between."""
    t = np.clip((value - np.float32(low)) / np.float32(high - low), 0, 1)
    return t * t * (3 - 2 * t)


# --- the plan: what is where, at PLAN_UM ------------------------------------------------------------------


@dataclass
class Gland:
    """A closed outline around (x, y): radius at angle t is `radius × (1 + Σ a cos(k t + p))`, µm."""

    x: float
    y: float
    radius: float
    wall: float
    """Thickness of the epithelium; above the radius, the gland is a solid nest."""
    waves: list[tuple[int, float, float]]
    vessel: bool = False

    def outline(self, angle: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        factor = np.ones_like(angle)
        for k, a, p in self.waves:
            factor = factor + a * np.cos(k * angle + p)
        return self.radius * factor


@dataclass
class Plan:
    """Fields of (height, width) at PLAN_UM; lengths in µm."""

    tissue: Field
    """Signed distance-like height above the tissue's edge: positive inside."""
    gland: Field
    """Signed distance to the nearest gland's outline, negative inside."""
    lumen: Field
    """Depth within that gland's lumen, negative in its wall and outside; at most 40 either way."""
    nest: Field
    """1 where that gland is a solid nest."""
    vessel: Field
    """1 where that gland is a blood vessel."""
    fibres: Field
    """A potential: collagen runs along its level lines."""
    fat: Field
    """1 where the tissue is fat, else -1; whole fat cells."""
    fat_wall: Field
    """Distance to the nearest wall between two fat cells."""
    lymph: Field
    """Share of the area that is lymphocytes, 0 to 1."""
    stain: Field
    """How strongly the section took the stain here, around 1."""
    pen: Field
    """Amount of ink."""
    dust: Field
    glands: list[Gland]


def islands(rng: np.random.Generator, width: int, height: int) -> Field:
    """Two or three pieces of tissue with ragged outlines; some glass stays free around them."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    u, v = x / width, y / height
    field = np.full((height, width), -1, np.float32)
    bend = 0.07 * noise(rng, width, height, max(width, height) / 4, 5)
    pieces = [(0.36, 0.53, 0.25, 0.31), (0.79, 0.38, 0.12, 0.2), (0.76, 0.8, 0.12, 0.09)]
    for cx, cy, rx, ry in pieces:
        cx, cy = cx + rng.uniform(-0.02, 0.02), cy + rng.uniform(-0.03, 0.03)
        angle = rng.uniform(-0.35, 0.35)
        du, dv = u - cx, v - cy
        a = (du * np.cos(angle) + dv * np.sin(angle)) / rx
        b = (-du * np.sin(angle) + dv * np.cos(angle)) / ry
        field = np.maximum(field, (1 - np.sqrt(a * a + b * b)) * min(rx, ry))
    tear = np.abs(noise(rng, width, height, max(width, height) / 2, 4))
    field = field + bend - 0.045 * smoothstep(0.05, 0.0, tear)
    margin = np.minimum(np.minimum(u, 1 - u) * width / height, np.minimum(v, 1 - v))
    field = np.minimum(field, margin - 0.04 + 0.1 * bend)
    distance = field * min(width, height) * PLAN_UM
    return distance + 10 * noise(rng, width, height, 90 / PLAN_UM, 3)


def scatter(rng: np.random.Generator, width_um: float, height_um: float, spacing: float, jitter: float) -> Field:
    """Points (n, 2) of x, y in µm on a jittered hexagonal grid."""
    columns, rows = int(width_um / spacing) + 1, int(height_um / (spacing * 0.866)) + 1
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    x = (x + 0.5 * (y % 2)) * spacing
    y = y * spacing * 0.866
    points = np.stack([x.ravel(), y.ravel()], 1)
    points += rng.uniform(-jitter, jitter, points.shape).astype(np.float32) * spacing
    inside = (points >= 0).all(1) & (points[:, 0] < width_um) & (points[:, 1] < height_um)
    return points[inside]


def make_glands(rng: np.random.Generator, tissue: Field, fat: Field, kind: Tissue) -> list[Gland]:
    height, width = tissue.shape
    clusters = noise(rng, width, height, 900 / PLAN_UM, 2)
    glands = []
    for x, y in scatter(rng, width * PLAN_UM, height * PLAN_UM, kind.gland_spacing, 0.28):
        at = (int(y / PLAN_UM), int(x / PLAN_UM))
        if tissue[at] < 60 or fat[at] > -0.25:
            continue
        waves = [(k, rng.uniform(0.02, 0.30 / k), rng.uniform(0, 6.3)) for k in (2, 3, 4, 5, 7)]
        if clusters[at] < -0.55 - 0.35 * (kind.rows - 1):
            if rng.random() < 0.18:
                glands.append(Gland(x, y, rng.uniform(14, 34), rng.uniform(4, 7), waves, vessel=True))
            continue
        radius = rng.uniform(*kind.gland_radius)
        wall = 4 * radius if rng.random() < kind.solid else rng.uniform(21, 28) + 4 * (kind.rows - 1)
        glands.append(Gland(x, y, radius, wall, waves))
    return glands


def fat_cells(rng: np.random.Generator, fat: Field, spacing: float) -> tuple[Field, Field]:
    """`fat` with one value for each cell of a jittered grid, so that fat ends at a cell's border,
    and the distance (µm) to the nearest such border."""
    height, width = fat.shape
    points = scatter(rng, width * PLAN_UM, height * PLAN_UM, spacing, 0.24) / PLAN_UM
    nearest = np.full((height, width), 1e6, np.float32)
    second = nearest.copy()
    whole = fat.copy()
    reach = int(1.6 * spacing / PLAN_UM)
    for px, py in points:
        x0, y0 = max(int(px) - reach, 0), max(int(py) - reach, 0)
        window = (slice(y0, int(py) + reach + 1), slice(x0, int(px) + reach + 1))
        rows, columns = nearest[window].shape
        y, x = np.ogrid[y0 : y0 + rows, x0 : x0 + columns]
        d = np.sqrt((x - px) ** 2 + (y - py) ** 2).astype(np.float32)
        whole[window] = np.where(d < nearest[window], fat[int(py), int(px)], whole[window])
        second[window] = np.minimum(second[window], np.maximum(d, nearest[window]))
        nearest[window] = np.minimum(nearest[window], d)
    return np.sign(whole), (second - nearest) * np.float32(PLAN_UM / 2)


def stroke(rng: np.random.Generator, width: int, height: int) -> Field:
    """A felt pen's line along a side of the slide, streaky as ink on glass is; amount of ink."""
    t = np.linspace(0, 1, 160)
    side = height * rng.uniform(0.055, 0.08)
    xs = width * (0.03 + 0.32 * t)
    ys = side + height * 0.035 * np.sin(2.4 * t + rng.uniform(0, 6)) + height * 0.03 * t
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    distance = np.full((height, width), 1e6, np.float32)
    top = slice(0, int(height * 0.3))
    for px, py in zip(xs, ys, strict=True):
        distance[top] = np.minimum(distance[top], (x[top] - px) ** 2 + (y[top] - py) ** 2)
    half = min(height * 0.02, 110 / PLAN_UM)
    edge = np.sqrt(distance) + 0.09 * half * noise(rng, width, height, half, 3)
    streaks = resized(rng.standard_normal((max(height // 2, 2), 6)).astype(np.float32), (width, height))
    ink = 0.72 + 0.16 * streaks + 0.3 * smoothstep(0.62 * half, half, edge)
    return smoothstep(half * 1.04, half * 0.96, edge) * np.clip(ink, 0.2, 1.4)


def specks(rng: np.random.Generator, width: int, height: int) -> Field:
    """Dust on the glass, out of focus; amount of grey."""
    field = np.zeros((height, width), np.float32)
    for _ in range(24):
        cx, cy = rng.uniform(0, width), rng.uniform(0, height)
        radius = rng.uniform(4, 16) / PLAN_UM
        reach = int(radius * 3) + 2
        x0, y0 = max(int(cx) - reach, 0), max(int(cy) - reach, 0)
        window = (slice(y0, int(cy) + reach), slice(x0, int(cx) + reach))
        rows, columns = field[window].shape
        y, x = np.ogrid[y0 : y0 + rows, x0 : x0 + columns]
        d = np.sqrt(((x - cx) * rng.uniform(0.5, 1.0)) ** 2 + (y - cy) ** 2) / radius
        field[window] += (rng.uniform(0.08, 0.5) * np.exp(-((d / 1.1) ** 4))).astype(np.float32)
    return field


def make_plan(rng: np.random.Generator, width_um: float, height_um: float, kind: Tissue) -> Plan:
    width, height = int(np.ceil(width_um / PLAN_UM)) + 2, int(np.ceil(height_um / PLAN_UM)) + 2
    tissue = islands(rng, width, height)
    fat = noise(rng, width, height, 1300 / PLAN_UM, 4) - np.float32(1.3 - 2.2 * kind.fat)
    glands = make_glands(rng, tissue, fat, kind)
    fat, fat_wall = fat_cells(rng, fat, 66)

    gland = np.full((height, width), 400, np.float32)
    lumen = np.full((height, width), -40, np.float32)
    nest = np.zeros((height, width), np.float32)
    vessel = np.zeros((height, width), np.float32)
    covered = np.zeros((height, width), np.bool_)
    for item in glands:
        reach = int((item.radius * 1.6 + 220) / PLAN_UM)
        px, py = item.x / PLAN_UM, item.y / PLAN_UM
        x0, y0 = max(int(px) - reach, 0), max(int(py) - reach, 0)
        window = (slice(y0, int(py) + reach), slice(x0, int(px) + reach))
        rows, columns = gland[window].shape
        y, x = np.mgrid[y0 : y0 + rows, x0 : x0 + columns].astype(np.float32)
        dx, dy = (x - px) * PLAN_UM, (y - py) * PLAN_UM
        d = np.hypot(dx, dy) - item.outline(np.arctan2(dy, dx)).astype(np.float32)
        closer = d < gland[window]
        gland[window] = np.where(closer, d, gland[window])
        hollow = np.clip(-d - item.wall, -40, 40).astype(np.float32)
        seen = lumen[window]
        lumen[window] = np.where(d < 4, np.where(covered[window], np.minimum(seen, hollow), hollow), seen)
        covered[window] |= d < 4
        nest[window] = np.where(closer, float(item.wall > item.radius), nest[window])
        vessel[window] = np.where(closer, float(item.vessel), vessel[window])

    fibres = 0.55 * gland + 130 * noise(rng, width, height, 700 / PLAN_UM, 2)
    fibres += 11 * noise(rng, width, height, 90 / PLAN_UM, 4)
    crowd = noise(rng, width, height, 420 / PLAN_UM, 3)
    lymph = smoothstep(1.5 - kind.lymphocytes, 2.3 - kind.lymphocytes, crowd)
    return Plan(
        tissue=tissue,
        gland=gland,
        lumen=lumen,
        nest=nest,
        vessel=vessel,
        fibres=fibres,
        fat=fat,
        fat_wall=fat_wall,
        lymph=lymph,
        stain=1 + 0.1 * noise(rng, width, height, 800 / PLAN_UM, 3),
        pen=stroke(rng, width, height),
        dust=specks(rng, width, height),
        glands=glands,
    )


# --- nuclei -----------------------------------------------------------------------------------------------

ANGLES = 16
VARIANTS = 8
KINDS = ("columnar", "vesicular", "fibroblast", "lymphocyte", "red cell")
AXES_UM = {
    "columnar": (9.5, 5.4),
    "vesicular": (11.0, 8.2),
    "fibroblast": (15.0, 2.9),
    "lymphocyte": (6.6, 6.0),
    "red cell": (6.8, 6.0),
}
STRENGTH = {"columnar": 1.15, "vesicular": 0.82, "fibroblast": 1.05, "lymphocyte": 1.45, "red cell": 1.0}


def stamp(rng: np.random.Generator, kind: str, angle: float, mpp: float) -> Field:
    """One nucleus as amount of haematoxylin (a red cell: of eosin), about 2 px of margin."""
    a, b = (0.5 * axis * rng.uniform(0.82, 1.22) / mpp for axis in AXES_UM[kind])
    reach = int(max(a, b) * 1.15) + 3
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
    x, y = x + rng.uniform(-0.5, 0.5), y + rng.uniform(-0.5, 0.5)
    u = x * np.cos(angle) + y * np.sin(angle)
    v = -x * np.sin(angle) + y * np.cos(angle)
    if kind == "fibroblast":
        v = v + 0.12 * b * np.sin(u / a * 2 + rng.uniform(0, 6))
    t = np.arctan2(v / b, u / a)
    outline = 1 + sum(rng.uniform(-0.09, 0.09) / (k - 1) * np.cos(k * t + rng.uniform(0, 6)) for k in (2, 3, 4))
    radius = np.sqrt((u / a) ** 2 + (v / b) ** 2) / outline
    softness = 0.9 / min(a, b)
    inside = smoothstep(1 + softness, 1 - softness, radius)
    if kind == "red cell":
        return (inside * (0.75 + 0.25 * radius)).astype(np.float32)
    grain = noise(rng, x.shape[1], x.shape[0], max(2.2 / mpp, 2), 2)
    chromatin = {"vesicular": 0.26, "columnar": 0.18, "fibroblast": 0.1, "lymphocyte": 0.24}[kind]
    amount = 0.86 + chromatin * grain
    if kind in ("vesicular", "columnar"):
        amount = amount + 0.42 * smoothstep(0.68, 0.98, radius)
    if kind == "vesicular" and rng.random() < 0.75:
        cx, cy = rng.uniform(-0.3, 0.3) * a, rng.uniform(-0.3, 0.3) * b
        spot = np.hypot(u - cx, v - cy) / (1.05 / mpp)
        amount = amount + 0.8 * smoothstep(1.3, 0.7, spot)
    strength = STRENGTH[kind] * rng.uniform(0.78, 1.2)
    return (inside * np.clip(amount, 0.25, 2) * strength).astype(np.float32)


@dataclass
class Cells:
    """Every cell of the slide, sorted by `y`. `x, y` in pixels; `stamp` an index into `bank`."""

    x: npt.NDArray[np.int32]
    y: npt.NDArray[np.int32]
    stamp: npt.NDArray[np.int32]
    bank: list[Field]
    reach: int


def at(field: Field, x: Field, y: Field) -> Field:
    """`field` at points in µm, nearest."""
    rows = np.clip((y / PLAN_UM).astype(int), 0, field.shape[0] - 1)
    columns = np.clip((x / PLAN_UM).astype(int), 0, field.shape[1] - 1)
    return field[rows, columns]


def place_cells(rng: np.random.Generator, plan: Plan, kind: Tissue, size: tuple[int, int], mpp: float) -> Cells:
    """Puts nuclei where tissue has them: in rows along glands, packed in nests, along fibres, in crowds."""
    width_um, height_um = size[0] * mpp, size[1] * mpp
    found: list[tuple[Field, Field, Field, int]] = []

    def add(name: str, x: Field, y: Field, angle: Field, keep: npt.NDArray[np.bool_]) -> None:
        keep = keep & (at(plan.tissue, x, y) > 5) & (x > 0) & (y > 0) & (x < width_um) & (y < height_um)
        found.append((x[keep], y[keep], angle[keep], KINDS.index(name)))

    for item in plan.glands:
        if item.vessel:
            inner = item.radius - item.wall - 3
            count = max(int(2.4 * inner * inner / 40), 0)
            t, r = rng.uniform(0, 2 * np.pi, count), np.sqrt(rng.random(count))
            edge = (item.outline(t) - item.wall - 4) * r
            x, y = item.x + edge * np.cos(t), item.y + edge * np.sin(t)
            add("red cell", x, y, t, np.full(count, rng.random() < 0.7))
            t = np.arange(0, 2 * np.pi, 16 / item.radius) + rng.uniform(0, 1)
            r = item.outline(t) - item.wall
            add("fibroblast", item.x + r * np.cos(t), item.y + r * np.sin(t), t + np.pi / 2, r > 0)
        elif item.wall < item.radius:
            for row in range(kind.rows):
                t = np.arange(0, 2 * np.pi, rng.uniform(5.6, 7.0) / item.radius)
                t = t + rng.uniform(-0.2, 0.2, t.shape) * 6 / item.radius
                depth = 7.5 + 8.5 * row + rng.normal(0, 1.7, t.shape)
                r = item.outline(t) - depth
                x, y = item.x + r * np.cos(t), item.y + r * np.sin(t)
                own = at(plan.gland, x, y) > -depth - 8
                slope = (item.outline(t + 0.01) - item.outline(t - 0.01)) / 0.02 / item.outline(t)
                add("columnar", x, y, t - np.arctan(slope) + rng.normal(0, 0.16, t.shape), own)

    def grid(spacing: float, jitter: float) -> tuple[Field, Field, Field]:
        points = scatter(rng, width_um, height_um, spacing, jitter)
        return points[:, 0], points[:, 1], rng.random(len(points)).astype(np.float32)

    x, y, chance = grid(11.2, 0.3)
    nest = (at(plan.gland, x, y) < -4) & (at(plan.nest, x, y) > 0.5)
    add("vesicular", x, y, chance * 40, nest & (chance < 0.93))

    smooth = resized(plan.fibres, (plan.fibres.shape[1] // 4, plan.fibres.shape[0] // 4))
    slope_y, slope_x = np.gradient(resized(smooth, plan.fibres.shape[::-1]))
    along = np.arctan2(slope_x, -slope_y)
    x, y, chance = grid(17.0, 0.42)
    stroma = (at(plan.gland, x, y) > 3) & (at(plan.fat, x, y) < 0)
    angle = at(along, x, y) + rng.normal(0, 0.14, x.shape)
    add("fibroblast", x, y, angle, stroma & (chance < kind.fibroblasts))

    x, y, chance = grid(7.4, 0.36)
    stroma = (at(plan.gland, x, y) > 3) & (at(plan.fat, x, y) < 0)
    share = 0.82 * at(plan.lymph, x, y) + 0.03 * kind.lymphocytes
    add("lymphocyte", x, y, chance * 40, stroma & (chance < share))

    x, y, chance = grid(14.0, 0.4)
    rim = (at(plan.fat, x, y) > 0) & (at(plan.fat_wall, x, y) < 3.5)
    add("fibroblast", x, y, chance * 40, rim & (chance < 0.22))

    bank = [
        stamp(rng, name, np.pi * step / ANGLES, mpp)
        for name in KINDS
        for step in range(ANGLES)
        for _ in range(VARIANTS)
    ]
    xs = np.concatenate([f[0] for f in found]) / mpp
    ys = np.concatenate([f[1] for f in found]) / mpp
    step = np.concatenate([np.round(f[2] / np.pi * ANGLES).astype(int) % ANGLES for f in found])
    which = np.concatenate([np.full(len(f[0]), f[3]) for f in found])
    index = (which * ANGLES + step) * VARIANTS + rng.integers(0, VARIANTS, len(step))
    order = np.argsort(ys, kind="stable")
    return Cells(
        x=xs[order].astype(np.int32),
        y=ys[order].astype(np.int32),
        stamp=index[order].astype(np.int32),
        bank=bank,
        reach=max(s.shape[0] for s in bank) // 2 + 1,
    )


def draw_cells(cells: Cells, top: int, nuclei: Field, red_cells: Field) -> None:
    """Stamps the cells that reach into rows `top…` onto the strips `nuclei` and `red_cells`."""
    rows, width = nuclei.shape
    first, last = np.searchsorted(cells.y, [top - cells.reach, top + rows + cells.reach])
    first_red = KINDS.index("red cell") * ANGLES * VARIANTS
    for x, y, index in zip(
        cells.x[first:last].tolist(),
        cells.y[first:last].tolist(),
        cells.stamp[first:last].tolist(),
        strict=True,
    ):
        shape = cells.bank[index]
        half = shape.shape[0] // 2
        y0, x0 = y - half - top, x - half
        y1, x1 = y0 + shape.shape[0], x0 + shape.shape[1]
        if y1 <= 0 or x1 <= 0 or y0 >= rows or x0 >= width:
            continue
        if y0 < 0 or x0 < 0 or y1 > rows or x1 > width:
            shape = shape[max(-y0, 0) : rows - y0, max(-x0, 0) : width - x0]
            y0, x0 = max(y0, 0), max(x0, 0)
            y1, x1 = y0 + shape.shape[0], x0 + shape.shape[1]
        target = red_cells if index >= first_red else nuclei
        np.maximum(target[y0:y1, x0:x1], shape, out=target[y0:y1, x0:x1])


# --- painting ---------------------------------------------------------------------------------------------


@dataclass
class Painter:
    """Paints blocks of the slide from its plan."""

    plan: Plan
    kind: Tissue
    size: tuple[int, int]
    mpp: float
    fibre: Field
    bundle: Field
    grain: Field
    fine: Field

    def block(self, left: int, top: int, nuclei: Field, red_cells: Field) -> npt.NDArray[np.uint8]:
        """RGB (rows, columns, 3) of the block at (left, top); `nuclei`, `red_cells` are its cells."""
        rows, columns = nuclei.shape
        scale = self.mpp / PLAN_UM
        box = (left * scale, top * scale, (left + columns) * scale, (top + rows) * scale)

        def fine(field: Field) -> Field:
            return resized(field, (columns, rows), box)

        x = np.arange(left, left + columns, dtype=np.float32)[None, :]
        y = np.arange(top, top + rows, dtype=np.float32)[:, None]
        wrapped = np.ix_((np.arange(rows) + top) % TEXTURE, (np.arange(columns) + left) % TEXTURE)
        grain = self.grain[wrapped]
        pixel = self.fine[wrapped]

        light = 0.955 + 0.012 * (x / self.size[0]) - 0.014 * (y / self.size[1]) + 0.0035 * pixel
        window = self.window(box)
        if self.plan.tissue[window].max() > -12:
            blue, pink = self.stains(left, top, fine, grain, pixel, nuclei, red_cells)
        else:
            blue = pink = np.zeros((rows, columns), np.float32)
        ink = fine(self.plan.pen) if self.plan.pen[window].max() > 0 else None
        grey = fine(self.plan.dust) if self.plan.dust[window].max() > 0 else None

        rgb = np.empty((rows, columns, 3), np.uint8)
        for channel, glass in enumerate((0.992, 0.988, 1.0)):
            density = HAEMATOXYLIN[channel] * blue + EOSIN[channel] * pink
            if ink is not None:
                density += PENS[self.kind.pen][channel] * np.maximum(ink, 0)
            if grey is not None:
                density += np.maximum(grey, 0)
            rgb[..., channel] = np.clip(255 * glass * light * np.exp(-density) + 0.5, 0, 255)
        return rgb

    def window(self, box: tuple[float, float, float, float]) -> tuple[slice, slice]:
        x0, y0, x1, y1 = box
        return slice(max(int(y0) - 2, 0), int(y1) + 3), slice(max(int(x0) - 2, 0), int(x1) + 3)

    def stains(
        self,
        left: int,
        top: int,
        fine: Callable[[Field], Field],
        grain: Field,
        pixel: Field,
        nuclei: Field,
        red_cells: Field,
    ) -> tuple[Field, Field]:
        """Amounts of haematoxylin and eosin."""
        plan = self.plan
        rows, columns = nuclei.shape
        gland = fine(plan.gland) + 0.8 * grain
        vessel = fine(plan.vessel)
        fat = fine(plan.fat)
        strength = fine(plan.stain)

        # Stroma: wavy bundles of collagen with clefts between them, along the level lines of the potential.
        potential = fine(plan.fibres) / self.mpp
        across = (potential * 1.6).astype(np.int32) & (TEXTURE - 1)
        along = (
            np.arange(left, left + columns, dtype=np.int32)[None, :]
            + (np.arange(top, top + rows, dtype=np.int32) * 5 // 7)[:, None]
        ) & (TEXTURE - 1)
        fibre = self.fibre[across, along]
        bundle = self.bundle[across, along]
        body = smoothstep(-1.7, 0.5, bundle + 0.4 * fibre + 0.3 * grain)
        tissue = fine(plan.tissue) + 1.1 * grain + 4.5 * bundle
        inside = smoothstep(-0.8, 1.2, tissue)
        stroma_pink = (0.07 + 0.45 * body) * (1 + 0.17 * fibre + 0.10 * grain + 0.04 * pixel)
        stroma_blue = 0.035 + 0.05 * body + 0.02 * fibre

        # Epithelium: a basophilic cytoplasm, paler towards the lumen, with an eosinophilic brush on its edge.
        depth = fine(plan.lumen) + 0.9 * grain
        apical = smoothstep(-14, -2, depth)
        cell_pink = 0.33 - 0.06 * apical + 0.06 * grain + 0.015 * pixel
        cell_blue = 0.19 - 0.10 * apical + 0.04 * grain
        cell_pink = cell_pink + 0.20 * np.exp(-(((depth + 1) / 1.8) ** 2))
        lumen = smoothstep(-0.4, 0.9, depth)
        secretion = 0.05 * smoothstep(0.2, 1.8, bundle + 0.5 * grain)
        vessel = smoothstep(0.3, 0.7, vessel)
        cell_pink = cell_pink + 0.22 * vessel
        cell_blue = cell_blue * (1 - 0.8 * vessel)
        cell_pink = cell_pink * (1 - lumen) + lumen * secretion
        cell_blue = cell_blue * (1 - lumen) + lumen * secretion * 0.4

        epithelium = smoothstep(0.9, -0.9, gland)
        membrane = np.exp(-((np.maximum(gland, 0) / 1.6) ** 2)) * (gland > 0)
        pink = stroma_pink * (1 - epithelium) + cell_pink * epithelium + 0.12 * membrane
        blue = stroma_blue * (1 - epithelium) + cell_blue * epithelium

        # Fat: empty cells with thin walls.
        if fat.max() > -0.9:
            fatty = smoothstep(-0.15, 0.15, fat) * smoothstep(0, 4, gland)
            border = fine(plan.fat_wall) + 0.25 * grain
            membranes = np.exp(-((border / 1.25) ** 2)) + 0.25 * smoothstep(4, 0, border)
            pink = pink * (1 - fatty) + fatty * (0.012 + 0.42 * membranes)
            blue = blue * (1 - fatty) + fatty * 0.08 * membranes

        crowd = fine(plan.lymph) * (1 - epithelium) * (fat < 0)
        pink = pink * (1 - 0.35 * crowd)
        blue = blue + 0.09 * crowd

        # The section's rim is thicker and takes more stain.
        rim = 1 + 0.45 * np.exp(-((np.maximum(tissue, 0) / 11) ** 2))
        pink *= inside * strength * rim
        blue *= inside * strength * rim
        covered = np.minimum(nuclei * 1.4, 1) * inside
        pink = pink * (1 - 0.5 * covered) + 0.17 * covered + red_cells * (0.75 + 0.08 * grain)
        blue = blue * (1 - 0.6 * covered) + nuclei * inside * (1 + 0.045 * pixel) * strength
        return np.maximum(blue, 0), np.maximum(pink, 0)


# --- the file ---------------------------------------------------------------------------------------------


def jpeg(tile: npt.NDArray[np.uint8]) -> bytes:
    """A full TILE² as JPEG; what is missing at the right and lower border is padded with its last pixels."""
    rows, columns = tile.shape[:2]
    if (rows, columns) != (TILE, TILE):
        tile = np.pad(tile, ((0, TILE - rows), (0, TILE - columns), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, "JPEG", quality=82, subsampling="4:2:0")
    return buffer.getvalue()


def tiles_of(rows: npt.NDArray[np.uint8]) -> Iterator[bytes]:
    for y in range(0, rows.shape[0], TILE):
        for x in range(0, rows.shape[1], TILE):
            yield jpeg(rows[y : y + TILE, x : x + TILE])


def reduced(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The image at 1/REDUCTION, each pixel the mean of those it covers."""
    return np.asarray(Image.fromarray(image).reduce(REDUCTION))


class Tiff:
    """Writes a tiled JPEG BigTIFF, one level after the other; `file` needs seeking."""

    SHORT, LONG, RATIONAL, LONG8, ASCII = (3, "H"), (4, "I"), (5, "II"), (16, "Q"), (2, "s")

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        self._link = 8
        """Where the offset of the next directory belongs."""

    def add(self, tiles: Iterator[bytes], width: int, height: int, mpp: float, smaller: bool = False) -> None:
        """Appends a level: its tiles row by row, then its directory. `smaller` marks a reduced level."""
        offsets, counts = [], []
        for tile in tiles:
            offsets.append(self._file.tell())
            counts.append(self._file.write(tile))
        per_cm = (round(1e4 / mpp * 1000), 1000)
        software = b"Slideway demo slide\0"
        entries: list[tuple[int, tuple[int, str], Sequence[int] | bytes]] = [
            (254, self.LONG, [int(smaller)]),  # NewSubfileType
            (256, self.LONG, [width]),
            (257, self.LONG, [height]),
            (258, self.SHORT, [8, 8, 8]),  # BitsPerSample
            (259, self.SHORT, [7]),  # Compression: JPEG
            (262, self.SHORT, [6]),  # PhotometricInterpretation: YCbCr
            (277, self.SHORT, [3]),  # SamplesPerPixel
            (282, self.RATIONAL, per_cm),
            (283, self.RATIONAL, per_cm),
            (284, self.SHORT, [1]),  # PlanarConfiguration: contiguous
            (296, self.SHORT, [3]),  # ResolutionUnit: centimetre
            (305, self.ASCII, software),
            (322, self.SHORT, [TILE]),
            (323, self.SHORT, [TILE]),
            (324, self.LONG8, offsets),
            (325, self.LONG8, counts),
            (530, self.SHORT, [2, 2]),  # YCbCrSubSampling
        ]
        directory = struct.pack("<Q", len(entries))
        for tag, (kind, code), values in entries:
            if isinstance(values, bytes):
                data, count = values, len(values)
            else:
                data, count = struct.pack(f"<{len(values)}{code[0]}", *values), len(values) // len(code)
            if len(data) > 8:
                data = struct.pack("<Q", self._append(data))
            directory += struct.pack("<HHQ8s", tag, kind, count, data)
        at = self._append(directory + struct.pack("<Q", 0))
        self._file.seek(self._link)
        self._file.write(struct.pack("<Q", at))
        self._file.seek(0, os.SEEK_END)
        self._link = at + len(directory)

    def _append(self, data: bytes) -> int:
        """Where `data` came to lie; directories begin at even offsets."""
        self._file.write(b"\0" * (self._file.tell() % 2))
        at = self._file.tell()
        self._file.write(data)
        return at


def make_slide(path: Path, seed: int, size: tuple[int, int] = (8192, 6144), mpp: float = 0.5) -> None:
    """Writes the slide of `seed`; `size` is (width, height) in pixels. The file appears when it is whole."""
    width, height = size
    rng = np.random.default_rng([seed, 20_240])
    kind = TISSUES[seed % len(TISSUES)]
    plan = make_plan(rng, width * mpp, height * mpp, kind)
    cells = place_cells(rng, plan, kind, size, mpp)
    painter = Painter(
        plan,
        kind,
        size,
        mpp,
        fibre=texture(rng, 22 / mpp, 1.3 / mpp),
        bundle=texture(rng, 34 / mpp, 5.0 / mpp),
        grain=texture(rng, 3.2 / mpp, 3.2 / mpp),
        fine=texture(rng, 1.0, 1.0),
    )
    smaller: list[npt.NDArray[np.uint8]] = []

    def full() -> Iterator[bytes]:
        for top in range(0, height, BLOCK):
            rows = min(BLOCK, height - top)
            nuclei = np.zeros((rows, width), np.float32)
            red_cells = np.zeros((rows, width), np.float32)
            draw_cells(cells, top, nuclei, red_cells)
            strip = np.empty((rows, width, 3), np.uint8)
            for left in range(0, width, BLOCK):
                part = np.s_[:, left : left + BLOCK]
                strip[part] = painter.block(left, top, nuclei[part], red_cells[part])
            smaller.append(reduced(strip))
            yield from tiles_of(strip)

    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            tiff = Tiff(file)
            tiff.add(full(), width, height, mpp)
            image = np.concatenate(smaller)
            for level in range(1, LEVELS):
                if level > 1:
                    image = reduced(image)
                tiff.add(tiles_of(image), image.shape[1], image.shape[0], mpp * REDUCTION**level, smaller=True)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def parse_size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 8192x6144") from None
    if not (BLOCK <= width <= 131_072 and BLOCK <= height <= 131_072):
        raise argparse.ArgumentTypeError(f"width and height must be {BLOCK} to 131072 pixels")
    return width, height


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make_slides.py", description="Draws an H&E-like slide.")
    parser.add_argument("--seed", type=int, default=0, help="decides the slide (default %(default)s)")
    parser.add_argument(
        "--size", type=parse_size, default=(8192, 6144), metavar="WxH", help="pixels (default 8192x6144)"
    )
    parser.add_argument("--mpp", type=float, default=0.5, help="µm per pixel (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the TIFF to write")
    options = parser.parse_args(arguments)
    if not 0.1 <= options.mpp <= 4:
        parser.error("--mpp must be 0.1 to 4")
    if options.seed < 0:
        parser.error("--seed must not be negative")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    make_slide(options.out, options.seed, options.size, options.mpp)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

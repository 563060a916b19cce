"""Outlines of a binary mask as polygons with holes, for QuPath and for cleaning: each piece of tissue is one outer
loop and the loops of its holes, so specks and holes are dropped by their area without labelling.

The boundary runs along pixel edges with tissue on its right (clockwise as seen, y downwards). Every edge knows
its successor, which one array operation finds; loops are then followed. Pixels that touch only at a corner are
apart; holes that touch at a corner are one."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bool = npt.NDArray[np.bool_]
Points = npt.NDArray[np.float64]
Whole = npt.NDArray[np.signedinteger[Any]]

_TOLERANCE = 0.35
"""Mask pixels. Two stretches of a loop are at least 0.7 apart, so a simplified loop cannot cross itself."""


@dataclass(frozen=True)
class Loop:
    """Corners (n, 2) of pixel edges, x then y, in order; not closed by repetition. Area in pixels, not negative."""

    corners: Whole
    area: int


@dataclass(frozen=True)
class Piece:
    """A connected piece of the mask."""

    outer: Loop
    holes: tuple[Loop, ...]

    @property
    def area(self) -> int:
        return self.outer.area - sum(hole.area for hole in self.holes)


def pieces_of(mask: Bool) -> list[Piece]:
    """The connected pieces of a mask (h, w), by their topmost, then leftmost pixel."""
    height, width = mask.shape
    columns = width + 2
    padded = np.zeros((height + 2, columns), np.bool_)
    padded[1:-1, 1:-1] = mask
    # An edge is its start corner × 4 + direction (east, south, west, north); corner (y, x) is y·columns + x.
    # A rough mask has millions of edges, so they are as small as they can be.
    number: type[np.signedinteger[Any]] = np.int32 if 4 * padded.size < 1 << 31 else np.int64
    starts = []
    whole = padded.ravel()
    for side, (offset, corner) in enumerate(((-columns, 0), (1, 1), (columns, columns + 1), (-1, columns))):
        here, there = (whole[-offset:], whole[:offset]) if offset < 0 else (whole[:-offset], whole[offset:])
        at = np.flatnonzero(here > there).astype(number)
        starts.append((at + (max(-offset, 0) + corner)) * 4 + side)
    edges = np.sort(np.concatenate(starts))
    del starts
    if not len(edges):
        return []
    direction = edges & 3
    end = ((edges >> 2) + np.array([1, columns, -1, -columns], number)[direction]) * 4
    successor = np.full(len(edges), -1, number)
    for turn in (1, 0, 3):  # right, straight on, left
        open_ends = np.flatnonzero(successor < 0)
        wanted = end[open_ends] + ((direction[open_ends] + turn) & 3)
        at = np.minimum(np.searchsorted(edges, wanted), len(edges) - 1).astype(number)
        found = edges[at] == wanted
        successor[open_ends[found]] = at[found]
    del direction, end

    # Of the array module: numpy is slow one by one, and a list's integers take ten times the memory.
    following = array("q" if number is np.int64 else "i", successor.tobytes())
    paths, firsts = array(following.typecode), []
    seen = bytearray(len(edges))
    for first in range(len(following)):
        if seen[first]:
            continue
        firsts.append(len(paths))
        edge = first
        while not seen[edge]:
            seen[edge] = 1
            paths.append(edge)
            edge = following[edge]
    return _group(edges, np.frombuffer(paths, number), np.array(firsts), columns)


def _group(edges: Whole, path: Whole, firsts: npt.NDArray[np.int64], columns: int) -> list[Piece]:
    """`path` has the edges loop by loop, each from `firsts` on. Holes go to the outer loop around them: left of a
    hole's first pixel lies tissue, and the run of tissue there begins at an edge of the outer loop, or of a hole of
    the same piece that lies further left."""
    lengths = np.diff(np.append(firsts, len(path)))
    before: Whole = np.arange(-1, len(path) - 1).astype(path.dtype)
    before[firsts] = firsts + lengths - 1
    corner, direction = edges[path] >> 2, edges[path] & 3
    x, y = corner % columns, corner // columns
    signed = np.add.reduceat(x[before] * y - x * y[before], firsts, dtype=np.int64) // 2
    turns = direction != direction[before]
    corners = np.stack([x[turns] - 1, y[turns] - 1], axis=1)
    ends = np.add.reduceat(turns, firsts, dtype=np.int64).cumsum().tolist()
    made = [
        Loop(corners[start:end], area)
        for start, end, area in zip([0, *ends], ends, np.abs(signed).tolist(), strict=False)
    ]

    # A north edge at the left of pixel (y, x) starts at corner (y + 1, x).
    loop_of = np.repeat(np.arange(len(firsts)), lengths)
    north = np.flatnonzero(direction == 3)
    north = north[np.argsort(corner[north])]
    # South edges run down the right side of tissue: after the topmost, leftmost comes the hole's first.
    pixel = np.minimum.reduceat(np.where(direction == 1, corner, corner.max()), firsts)
    inner = np.flatnonzero(signed < 0)
    inner = inner[np.argsort(pixel[inner])]
    beside = loop_of[north[np.searchsorted(corner[north] - columns, pixel[inner]) - 1]]
    holes: dict[int, list[Loop]] = {index: [] for index in np.flatnonzero(signed > 0).tolist()}
    parent = list(range(len(firsts)))
    for index, neighbour in zip(inner.tolist(), beside.tolist(), strict=True):
        parent[index] = parent[neighbour]
        holes[parent[index]].append(made[index])
    return [Piece(made[index], tuple(inside)) for index, inside in holes.items()]


def fill(pieces: list[Piece], shape: tuple[int, int]) -> Bool:
    """The mask (h, w) that the pieces outline, exactly."""
    toggles = np.zeros((shape[0], shape[1] + 1), np.bool_)
    for piece in pieces:
        for loop in (piece.outer, *piece.holes):
            x, y = loop.corners[:, 0], loop.corners[:, 1]
            for x0, y0, x1, y1 in zip(x, y, np.roll(x, -1), np.roll(y, -1), strict=True):
                if x0 == x1:
                    toggles[min(y0, y1) : max(y0, y1), x0] ^= True
    return np.logical_xor.accumulate(toggles, axis=1)[:, :-1]


def labels(pieces: list[Piece], shape: tuple[int, int]) -> npt.NDArray[np.int32]:
    """The same with each piece's number, from 1 on, in its pixels (h, w)."""
    steps = np.zeros((shape[0], shape[1] + 1), np.int32)
    for number, piece in enumerate(pieces, 1):
        for loop in (piece.outer, *piece.holes):
            x, y = loop.corners[:, 0], loop.corners[:, 1]
            for x0, y0, x1, y1 in zip(x, y, np.roll(x, -1), np.roll(y, -1), strict=True):
                if x0 == x1:  # tissue lies right of an edge that goes up, left of one that goes down
                    steps[min(y0, y1) : max(y0, y1), x0] += number if y1 < y0 else -number
    return steps.cumsum(axis=1, dtype=np.int32)[:, :-1]


def smooth(loop: Loop) -> Points:
    """The loop with its staircase cut at the middle of each unit edge and simplified by a third of a pixel.
    Points (n, 2), not closed by repetition."""
    corners = loop.corners.astype(np.float64)
    following = np.roll(corners, -1, axis=0)
    lengths = np.abs(following - corners).sum(axis=1).astype(np.int64)
    # Long straight runs need only the middles of their first and last unit edge.
    unit = (following - corners) / lengths[:, None]
    first, last = corners + unit / 2, following - unit / 2
    points = np.stack([first, last], axis=1).reshape(-1, 2)
    points = points[np.any(points != np.roll(points, 1, axis=0), axis=1)]
    return _simplify(points)


def _simplify(points: Points) -> Points:
    """Douglas–Peucker on a closed loop, split at its first point and the one farthest from it."""
    if len(points) <= 4:
        return points
    far = int(np.argmax(((points - points[0]) ** 2).sum(axis=1)))
    closed = np.concatenate([points, points[:1]])
    keep = np.zeros(len(closed), np.bool_)
    keep[[0, far, len(points)]] = True
    spans = [(0, far), (far, len(points))]
    while spans:
        start, stop = spans.pop()
        if stop - start < 2:
            continue
        line = closed[stop] - closed[start]
        offset = closed[start + 1 : stop] - closed[start]
        along = np.clip(offset @ line / max(float(line @ line), 1e-12), 0, 1)
        distance = ((offset - along[:, None] * line) ** 2).sum(axis=1)
        worst = int(np.argmax(distance))
        if distance[worst] > _TOLERANCE**2:
            middle = start + 1 + worst
            keep[middle] = True
            spans += [(start, middle), (middle, stop)]
    return closed[:-1][keep[:-1]]

"""Tiles of matrices: loading them, multiplying them, and the order to walk over them."""

import triton
import triton.language as tl


@triton.jit
def load_tile(source, row, column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """A tile of a matrix, zero outside of it."""
    if TMA:
        tile = source.load([row, column])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        tile = tl.load(source + r[:, None].to(tl.int64) * stride + c[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(target, tiles, row, column, rows, columns, stride, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """Write a tile of a matrix, but nothing outside of it; ``tiles`` is the descriptor of ``target``."""
    tile = tile.to(target.dtype.element_ty)
    if TMA:
        tiles.store([row, column], tile)
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        tl.store(target + r[:, None].to(tl.int64) * stride + c[None, :], tile, mask=inside)


@triton.jit
def in_groups(item, num_rows, num_columns, GROUP: tl.constexpr):
    """Row and column of a tile, in an order that comes back to the same rows and columns soon, while they are cached."""
    per_group = GROUP * num_columns
    first = item // per_group * GROUP
    height = min(num_rows - first, GROUP)
    return first + item % per_group % height, item % per_group // height


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a b``."""
    if PRECISION == "upcast":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def known_multiple(number, VECTOR: tl.constexpr):
    """``number``, a multiple of VECTOR, which the compiler then knows as well: so it may load and store whole vectors."""
    return number // VECTOR * VECTOR

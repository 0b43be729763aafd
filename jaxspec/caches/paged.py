# SPDX-License-Identifier: Apache-2.0
"""A cache of pages that rows take when they need them, and may share.

One table serves all layers: page p of every layer's pool belongs to the same
positions of the same rows. All bookkeeping is on the device, inside the
compiled loop: a free stack, a count of users a page, and the table.

Caches only append, so a row writes to no page but the one behind its last full
page. Full pages can be shared without care; `fork` copies the one partial page
at once, and no other write ever has to look whether its page is shared.

Admission is by reservation. `insert` promises a row the pages of its longest
length. While `fits` is asked before each insert, no row in a loop is ever
without a page. A row that has no reservation, or outgrows it, takes what nobody
was promised; where nothing is left it is `starved`: it keeps what it has, takes
nothing more, and hurts nobody.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxspec import sharding
from jaxspec.caches.contiguous import ContiguousCache, write_path, zeros
from jaxspec.caches.fresh import Fresh, Place
from jaxspec.errors import InputError
from jaxspec.kernels import tree_attention

# A row may hold any page, so that pools are not split over the data axis: each
# data shard keeps, and writes, all of its tensor shard's pages.
AXES = (None, "kv_heads", None, None)


@struct.dataclass
class Pages:
  """Who holds which page.

  Attributes:
    users: how many rows hold each page. Page 0, the null page, is nobody's:
      it stands in tables for "none".
    stack: the free pages are `stack[:free]`; the last is taken first.
  """

  users: Int[Array, "X"]
  stack: Int[Array, "X"]
  free: Int[Array, ""]

  @classmethod
  def empty(cls, pages: int) -> "Pages":
    return cls(jnp.zeros(pages, jnp.int32),
               jnp.arange(pages - 1, -1, -1, dtype=jnp.int32),
               jnp.asarray(pages - 1, jnp.int32))

  def take(self, counts: Int[Array, "R"], most: int
           ) -> tuple["Pages", Int[Array, "R {most}"]]:
    """Takes `counts[r] <= most` pages for each r, together no more than free.

    Returns:
      What is left, and the pages, 0 beyond `counts[r]`.
    """
    nth = jnp.arange(most)[None]
    wanted = nth < counts[:, None]
    at = self.free - 1 - (jnp.cumsum(counts) - counts)[:, None] - nth
    taken = jnp.where(wanted, self.stack[jnp.maximum(at, 0)], 0)
    users = self.users.at[self._index(taken)].set(1, mode="drop")
    left = self.free - jnp.sum(counts, dtype=jnp.int32)
    return self.replace(users=users, free=left), taken

  def hold(self, pages: Int[Array, "R M"]) -> "Pages":
    """Adds a user to each of these pages."""
    return self.replace(
        users=self.users.at[self._index(pages)].add(1, mode="drop"))

  def give_back(self, pages: Int[Array, "R M"]) -> "Pages":
    """Takes a user from each; pages without users are free again."""
    users = self.users.at[self._index(pages)].add(-1, mode="drop")
    freed = (self.users > 0) & (users == 0)
    # Ranked by number: a page two rows leave together is freed once.
    at = self.free + jnp.cumsum(freed, dtype=jnp.int32) - 1
    every = jnp.arange(len(users), dtype=jnp.int32)
    stack = self.stack.at[jnp.where(freed, at, len(users))].set(
        every, mode="drop")
    return Pages(users, stack,
                 self.free + jnp.sum(freed, dtype=jnp.int32))

  def _index(self, pages):
    return jnp.where(pages > 0, pages, len(self.users))


@struct.dataclass
class PagedCache:
  """Pools of pages, `page` positions each, and a table.

  Attributes:
    table: the pages of each row, in order; 0 where there is none.
    reserve: how many pages each row was promised, those it has included.
    starved: rows that asked for a page when none was left, or outgrew the
      table. Their length stands still until they are inserted or released,
      by which the loop knows that their requests end here.
  """

  k: tuple[Float[Array, "X G page K"], ...]
  v: tuple[Float[Array, "X G page K"], ...]
  length: Int[Array, "B"]
  table: Int[Array, "B M"]
  reserve: Int[Array, "B"]
  starved: Bool[Array, "B"]
  pages: Pages

  @classmethod
  def empty(cls, windows, rows, capacity, kv_heads, head_size, dtype, *,
            page: int = 64, pages: int | None = None):
    """See `Cache.empty`.

    Args:
      page: positions a page holds.
      pages: size of the pool, the null page included; by default every row
        can grow to `capacity`.

    Raises:
      InputError: a size that is none, or a pool in which not even one row can
        grow to `capacity`.
    """
    _at_least(1, "page", page)
    most = -(-capacity // page)
    if pages is None:
      pages = rows * most + 1
    _at_least(most + 1, "pages", pages,
              f" to hold one row of {capacity} tokens")
    shape = (pages, kv_heads, page, head_size)
    def pools():
      return tuple(zeros(shape, dtype, AXES) for _ in windows)
    return cls(pools(), pools(), jnp.zeros(rows, jnp.int32),
               jnp.zeros((rows, most), jnp.int32), jnp.zeros(rows, jnp.int32),
               jnp.zeros(rows, bool), Pages.empty(pages))

  @property
  def dtype(self) -> Any:
    return self.k[0].dtype

  @property
  def page(self) -> int:
    """Positions a page holds."""
    return self.k[0].shape[2]

  @property
  def capacity(self) -> int:
    """The longest a row can grow, in positions."""
    return self.table.shape[1] * self.page

  @property
  def held(self) -> Int[Array, "B"]:
    """How many pages each row holds."""
    return self.pages_needed(self.length)

  def pages_needed(self, tokens: Any) -> Any:
    """Pages that hold so many positions; takes integers or arrays."""
    return (tokens + self.page - 1) // self.page

  def available(self) -> Int[Array, ""]:
    """Free pages that no row was promised: what can still be reserved."""
    return self.pages.free - jnp.sum(self._promised(), dtype=jnp.int32)

  def fits(self, lengths: Sequence[int]) -> int:
    needed = np.cumsum([self.pages_needed(n) for n in lengths])
    return int(np.sum(needed <= int(_available(self))))

  def attend(self, layer: int, query: Float[Array, "B T H K"], fresh: Fresh,
             at: Place, **options) -> Float[Array, "B T H K"]:
    slots = jnp.arange(self.capacity)[None]
    held = jnp.where(slots < self.length[:, None], slots, -1)
    return tree_attention(
        query, self.k[layer], self.v[layer], fresh.k[layer], fresh.v[layer],
        slot_positions=held, positions=at.tokens, fresh_positions=at.positions,
        seen=at.seen, table=self.table, **options)

  def commit(self, fresh: Fresh, path: Int[Array, "B P"],
             kept: Int[Array, "B"]) -> "PagedCache":
    count = path.shape[1]
    asked = jnp.where(self.starved, 0, kept)
    after = self.length + asked
    fits = after <= self.capacity
    need = jnp.where(fits, self.pages_needed(after) - self.held, 0)
    # Promised pages are there. The others are given in row order; the first
    # that asks for too much starves, with all that ask for one behind it.
    extra = jnp.maximum(need - self._promised(), 0)
    granted = fits & (
        (extra == 0) | (jnp.cumsum(extra) <= self.available()))
    need, kept = (jnp.where(granted, x, 0) for x in (need, asked))

    most = self.pages_needed(count)
    pages, taken = self.pages.take(need, most)
    new = jnp.arange(most)[None]
    at = jnp.where(new < need[:, None], self.held[:, None] + new,
                   self.table.shape[1])
    rows = jnp.arange(len(self.length))[:, None]
    table = self.table.at[rows, at].set(taken, mode="drop")

    nth = jnp.arange(count)[None]
    position = self.length[:, None] + nth
    entry = jnp.minimum(position // self.page, table.shape[1] - 1)
    target = jnp.where(nth < kept[:, None],
                       jnp.take_along_axis(table, entry, axis=1),
                       len(pages.users))
    k, v = write_path(self.k, self.v, fresh, path,
                      target * self.page + position % self.page, axes=AXES,
                      paged=True)
    starved = self.starved | ~granted
    return self.replace(
        k=k, v=v, length=self.length + kept, table=table, starved=starved,
        reserve=jnp.where(starved, 0, self.reserve), pages=pages)

  def insert(self, rows: Int[Array, "R"], prefix: ContiguousCache,
             reserve: Int[Array, "R"]) -> "PagedCache":
    """Replaces whole rows; see `Cache.insert`.

    A row for whose prefix there is no room becomes empty and `starved`. A
    reservation that does not fit is not made; nobody else's suffers.
    """
    rows = self._targets(rows)
    self = self.release(_mask(rows, len(self.length)))
    width = self.table.shape[1]
    length = jnp.where(rows < len(self.length), prefix.length, 0)
    need = self.pages_needed(length)
    granted, promise = self._admit(need, self.pages_needed(reserve), rows)
    need = jnp.where(granted, need, 0)

    most = min(self.pages_needed(prefix.capacity), width)
    pages, taken = self.pages.take(need, most)
    spare = max(most * self.page - prefix.capacity, 0)
    def contents(new):
      new = jnp.pad(new, ((0, 0), (0, 0), (0, spare), (0, 0)))
      new = new[:, :, :most * self.page]
      new = new.reshape(*new.shape[:2], most, self.page, new.shape[-1])
      return jnp.moveaxis(new, 2, 1)                     # [R M G page K]
    return self._set(
        rows, taken, tuple(map(contents, prefix.k)),
        tuple(map(contents, prefix.v)), pages=pages,
        length=jnp.where(granted, length, 0),
        table=jnp.pad(taken, ((0, 0), (0, width - most))),
        reserve=promise, starved=~granted)

  def fork(self, sources: Int[Array, "R"], targets: Int[Array, "R"],
           reserve: Int[Array, "R"]) -> "PagedCache":
    """Makes rows `targets` continue what rows `sources` hold.

    Full pages are shared, the partial one behind them is copied. That copy is
    the copy on write, made ahead: it is the only page of its row that will be
    written. A row may be source and target at once, as in a beam search.

    Args:
      targets: differ; an index of B or more, or one that is its own source,
        is left alone.
      reserve: the longest each target may grow, in positions.
    """
    targets = jnp.where(sources == targets, len(self.length),
                        self._targets(targets))
    real = targets < len(self.length)
    length = jnp.where(real, self.length[sources], 0)
    starved = self.starved[sources]
    full = length // self.page
    table = self.table[sources]
    nth = jnp.arange(table.shape[1])[None]
    shared = jnp.where(nth < full[:, None], table, 0)
    partial = length % self.page > 0
    tail = jnp.where(nth == full[:, None], table, 0).sum(axis=1)
    # Read and hold before anything is given back.
    def tails(pool):
      return pool.at[tail[:, None]].get(mode="promise_in_bounds")
    k, v = tuple(map(tails, self.k)), tuple(map(tails, self.v))
    self = self.replace(pages=self.pages.hold(shared))
    self = self.release(_mask(targets, len(self.length)))

    need = jnp.where(partial & real, 1, 0)
    granted, promise = self._admit(
        need, self.pages_needed(reserve) - full, targets)
    refused = jnp.where(granted[:, None], 0, shared)
    shared = jnp.where(granted[:, None], shared, 0)
    pages, taken = self.pages.give_back(refused).take(
        jnp.where(granted, need, 0), 1)
    copied = (nth == full[:, None]) & (partial & granted)[:, None]
    return self._set(
        targets, taken, k, v, pages=pages,
        length=jnp.where(granted, length, 0),
        table=jnp.where(copied, taken, shared),
        reserve=jnp.where(granted & (promise > 0) & ~starved,
                          promise + full, 0),
        starved=starved | ~granted)

  def release(self, rows: Bool[Array, "B"]) -> "PagedCache":
    gone = jnp.where(rows[:, None], self.table, 0)
    return self.replace(
        length=jnp.where(rows, 0, self.length), table=self.table - gone,
        reserve=jnp.where(rows, 0, self.reserve),
        starved=self.starved & ~rows, pages=self.pages.give_back(gone))

  def _promised(self):
    """Pages each row was promised and does not have yet."""
    return jnp.maximum(self.reserve - self.held, 0)

  def _targets(self, rows):
    # Negative indices would count from the end.
    return jnp.where(rows < 0, len(self.length), rows)

  def _admit(self, need, wish, rows):
    """Who gets `need` pages now, and how many pages each is promised.

    Returns:
      Flags, and for each row at least what it needs: all it wishes for if
      that can be kept.
    """
    real = rows < len(self.length)
    wish = jnp.where(real, jnp.maximum(wish, need), 0)
    free = self.available()
    kept = jnp.cumsum(wish) <= free
    cost = jnp.where(kept, wish, need)
    fits = need <= self.table.shape[1]
    granted = fits & (kept | (need == 0) | (jnp.cumsum(cost) <= free))
    return granted, jnp.where(granted & kept, wish, 0)

  def _set(self, rows, taken, k, v, *, pages, **fields):
    """Writes pages `taken` and the `fields` of `rows`."""
    index = jnp.where(taken > 0, taken, len(pages.users))
    def put(pool, new):
      return sharding.constrain(
          pool.at[index].set(new.astype(pool.dtype), mode="drop"), *AXES)
    fields = {name: getattr(self, name).at[rows].set(value, mode="drop")
              for name, value in fields.items()}
    return self.replace(k=tuple(map(put, self.k, k)),
                        v=tuple(map(put, self.v, v)), pages=pages, **fields)


# For the host: a program of its own, compiled once.
_available = jax.jit(PagedCache.available)


def _at_least(least: int, name: str, value: int, why: str = "") -> None:
  if value < least:
    raise InputError(f"paged: {name} must be at least {least}{why}, "
                     f"got {value}")


def _mask(rows: Int[Array, "R"], count: int) -> Bool[Array, "{count}"]:
  return jnp.zeros(count, bool).at[rows].set(True, mode="drop")

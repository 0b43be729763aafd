# SPDX-License-Identifier: Apache-2.0
"""What speculation can give, from acceptance and the cost of a draft.

  python -m experiments.speedup_arithmetic

If each of K drafted tokens is accepted with chance a, given that those before
it were, a pass emits (1 - a^(K+1)) / (1 - a) tokens; if drafting one costs c
passes of the target, a step costs 1 + K c (Leviathan et al. 2023,
arXiv:2211.17192, theorem 3.8). This reproduces that paper's table, and takes
apart a claim that is often repeated: "4.5 times faster at 80 % acceptance".
"""

import sys
from typing import Any

from experiments import machine

# Leviathan et al., table 1: a, K, arithmetic operations, speed; c is 0.
TABLE = ((0.6, 2, 1.53, 1.96), (0.7, 3, 1.58, 2.53), (0.8, 2, 1.23, 2.44),
         (0.8, 5, 1.63, 3.69), (0.9, 2, 1.11, 2.71), (0.9, 10, 1.60, 6.86))


def tokens_per_pass(acceptance: float, length: int) -> float:
  """Tokens that a pass over `length` drafted ones emits on average."""
  if acceptance == 1:
    return length + 1.0
  return (1 - acceptance ** (length + 1)) / (1 - acceptance)


def speedup(acceptance: float, length: int, cost: float) -> float:
  """Over plain decoding; `cost` of a drafted token in passes of the target."""
  return tokens_per_pass(acceptance, length) / (1 + length * cost)


def operations(acceptance: float, length: int, cost: float = 0.0) -> float:
  """Arithmetic a token, over plain decoding's."""
  return (length * (cost + 1) + 1) / tokens_per_pass(acceptance, length)


def best(acceptance: float, cost: float, longest: int = 64
         ) -> tuple[int, float]:
  """The draft length that pays most, 0 included, and what it gives."""
  return max(((k, speedup(acceptance, k, cost)) for k in range(longest + 1)),
             key=lambda pair: pair[1])


def acceptance_for(wanted: float, cost: float) -> float | None:
  """The least acceptance at which any length gives `wanted`; None if none."""
  low, high = 0.0, 1.0 - 1e-9
  if best(high, cost, 4096)[1] < wanted:
    return None
  for _ in range(60):
    middle = (low + high) / 2
    if best(middle, cost, 4096)[1] < wanted:
      low = middle
    else:
      high = middle
  return high


def free_length(wanted: float, acceptance: float) -> int | None:
  """Drafted tokens it takes if they cost nothing; None if it never does."""
  if 1 / (1 - acceptance) <= wanted:
    return None
  return next(k for k in range(10**6)
              if tokens_per_pass(acceptance, k) >= wanted)


def claims() -> list[dict[str, Any]]:
  """What 80 % acceptance gives at each cost of a draft, and 4.5 times takes."""
  return [{
      "cost": cost,
      "best_length_at_80_percent": best(0.8, cost)[0],
      "speed_at_80_percent": best(0.8, cost)[1],
      "acceptance_for_4.5": acceptance_for(4.5, cost),
  } for cost in (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)]


def main() -> None:
  """Prints both tables, and writes them where the first argument says."""
  print("acceptance  length  operations  speed   (published)")
  for acceptance, length, ops, speed in TABLE:
    print(f"{acceptance:10.1f}  {length:6d}  "
          f"{operations(acceptance, length):10.2f}  "
          f"{speedup(acceptance, length, 0):5.2f}   ({ops:.2f}, {speed:.2f})")
  print("\ndraft cost  best length  speed at 80 %  acceptance for 4.5 times")
  for line in claims():
    wanted = line["acceptance_for_4.5"]
    print(f"{line['cost']:10.2f}  {line['best_length_at_80_percent']:11d}  "
          f"{line['speed_at_80_percent']:13.2f}  "
          + (f"{100 * wanted:.1f} %" if wanted else "none is enough"))
  print(f"\nAt 80 % even drafts that cost nothing must be "
        f"{free_length(4.5, 0.8)} long.")
  if sys.argv[1:]:
    machine.write(sys.argv[1], claims())


if __name__ == "__main__":
  main()

# SPDX-License-Identifier: Apache-2.0
"""What is asserted of whole programs is seen when it is not so."""

import types

from experiments.kernel_programs import PROGRAMS, problems
from pallas_kernels import compiling

KEYS = (8, 3, 2048, 64)
GOOD = """
%commit_kv.1 = (bf16[1,8,3,64,2048]) custom-call(%a, %b), custom_call_target="tpu_custom_call"
%copy-start.2 = (s32[8,2048]{1,0:S(1)}, s32[8,2048]{1,0}, u32[]{:S(2)}) copy-start(%c)
%add.1 = bf16[8,3,64,2048]{3,2,1,0} add(%copy.3, %d)
"""  # noqa: E501 - lines of a compiler
BAD = """
%copy-start.3 = (bf16[8,3,2048,64]{2,3,1,0:T(8,128)(2,1)}, bf16[8,3,2048,64]{2,3,1,0:S(1)}, u32[]{:S(2)}) copy-start(%g)
%copy.3 = bf16[8,3,64,2048]{3,2,1,0} copy(%x)
%copy-start.4 = (bf16[1,8,3,64,2048]{4,3,2,1,0:T(8,128)(2,1)}, bf16[1,8,3,64,2048]{4,3,2,1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) copy-start(%y)
%slice-start = ((bf16[8,3,2048,64]{3,2,1,0:T(8,128)(2,1)}), bf16[4,3,2048,64]{3,2,1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%z), slice={[0:4], [0:3], [0:2048], [0:64]}
"""  # noqa: E501


def memory(taken, temporaries):
  return types.SimpleNamespace(alias_size_in_bytes=taken,
                               temp_size_in_bytes=temporaries,
                               argument_size_in_bytes=1000)


def test_what_is_as_it_has_to_be():
  assert problems(GOOD, memory(500, 19), 500, KEYS) == []
  assert compiling.copied(GOOD, KEYS) == []


def test_what_is_not():
  assert problems(BAD, memory(499, 20), 500, KEYS) == [
      "no kernel is in the program",
      "of 500 bytes of state 499 are taken over",
      "temporaries are 2.0 % of what is given",
      "4 copies of a layer's keys"]


def test_a_row_of_one():
  """Its keys are those of a cache of one row."""
  text = "%copy.5 = bf16[3,2048,64]{2,1,0} copy(%x)"
  assert compiling.copied(text, (1, 3, 2048, 64)) == ["bf16[3,2048,64]"]
  assert not compiling.copied(text, (2, 3, 2048, 64))


def test_topologies_are_of_generations_that_are_known():
  assert {target for found in PROGRAMS.values() for target in found} == set(
      compiling.TOPOLOGIES)

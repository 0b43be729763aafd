# SPDX-License-Identifier: Apache-2.0
"""Committed keys and values, under one contract.

A cache is read-only inside a step. Nodes in flight live in `Fresh`; the
accepted path of each row is written by `commit`, all layers at once, and
rejected nodes are forgotten because they were never written anywhere.
"""

from jaxspec.caches.fresh import Cache as Cache
from jaxspec.caches.fresh import Fresh as Fresh
from jaxspec.caches.fresh import Place as Place

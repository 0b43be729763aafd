# SPDX-License-Identifier: Apache-2.0
"""The one error a user's input can cause.

Every message is one sentence: what was asked, what was found, what to do.
The apps print it and exit with status 2; a library caller catches it.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
  """A file, flag, prompt or mesh that jaxspec cannot work with."""


def nearest(word: str, known: Iterable[str]) -> str:
  """Returns " Did you mean 'x'?" for the nearest of `known`, or ""."""
  match = difflib.get_close_matches(word, list(known), n=1)
  return f" Did you mean {match[0]!r}?" if match else ""

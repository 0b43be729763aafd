# SPDX-License-Identifier: Apache-2.0
"""The one error that what a user gives can cause."""


class InputError(ValueError):
  """A file or a flag that cannot be worked with.

  Its message is one sentence: what was found, where, and what to do.
  """

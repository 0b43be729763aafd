# SPDX-License-Identifier: Apache-2.0
"""How calls are checked while tests run (see addopts in pyproject.toml)."""

import beartype

check = beartype.beartype(
  conf=beartype.BeartypeConf(
    # An int may stand for a float, as everywhere in Python.
    is_pep484_tower=True,
    # What cannot be checked (`Self`, a plain Protocol) goes unchecked and is
    # listed among pytest's warnings.
    warning_cls_on_decorator_exception=UserWarning,
  )
)

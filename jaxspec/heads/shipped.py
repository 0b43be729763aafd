# SPDX-License-Identifier: Apache-2.0
"""Trained heads that come with the package, found by the model they are for.

`SHIPPED/MODEL/NAME` is a folder as `jaxspec.heads.save` writes it, and
`SHIPPED/MODEL/CARD.md` says on what its heads were taught and how they score.
"""

import json
import pathlib

from jaxspec.belonging import CONFIG, fingerprint
from jaxspec.errors import InputError, nearest
from jaxspec.models.transformer import Transformer

SHIPPED = pathlib.Path(__file__).parent / "trained"


def find(text: str, model: Transformer, kind: str) -> pathlib.Path:
  """The folder of heads that `text` names.

  Args:
    text: a folder; or the name of heads that are shipped for this model; or
      nothing, for the first of them (of exits, the nearest to a third of the
      depth).

  Raises:
    InputError: there is neither; says what there is.
  """
  if text and pathlib.Path(text).expanduser().is_dir():
    return pathlib.Path(text).expanduser()
  known = names(model, kind)
  if text in known:
    return known[text]
  if not text and known:
    return next(iter(known.values()))
  if text and known:
    raise InputError(f"heads={text} is no folder, nor shipped for this model; "
                     f"there are {', '.join(known)}.{nearest(text, [*known])}")
  asked = f"heads={text} is no folder, and " if text else ""
  raise InputError(f"{asked}no heads of kind {kind} are shipped for this "
                   "model; pass heads=FOLDER, as train_heads writes it")


def names(model: Transformer, kind: str) -> dict[str, pathlib.Path]:
  """What is shipped for a model, by name, what suits it best first."""
  found, here = [], None
  for file in sorted(SHIPPED.glob(f"*/*/{CONFIG}")):
    config = json.loads(file.read_text(encoding="utf-8"))
    here = here or fingerprint(model)
    if config["kind"] == kind and config["model"] == here:
      far = abs(config.get("layer", 0) - model.depth / 3)
      found.append((far, file.parent.name, file.parent))
  return {name: folder for _, name, folder in sorted(found)}

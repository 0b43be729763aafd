# SPDX-License-Identifier: Apache-2.0
"""Heads that draft from what the model computes anyway. One file a kind.

They are made for one model, and are kept in a folder of their own: a
`config.json`, which says what they are and bears the model's fingerprint, and
a `model.safetensors`. They are read-only here: `jaxspec.distillation` trains.

Each file holds one class with a `kind`, which is the file's name; `load` finds
it, so that a new kind touches no list. It has `init` for untrained heads,
`bounds` of its options, `settings` for its config,
`tensors` to be kept, `tokens` it can say (None for all), and `read`. To be
taught it has `taps`, the layers below which it reads the stream beside the
top; `foretell`, how far it looks ahead and what it says there; and `like`, the
same with other weights.
"""

from jaxspec.heads.eagle import EagleHead, default_taps
from jaxspec.heads.exit import ExitHead
from jaxspec.heads.folder import Stored, fingerprint, load, note, save
from jaxspec.heads.hydra import HydraHeads
from jaxspec.heads.kinds import kinds, parse
from jaxspec.heads.medusa import MedusaHeads
from jaxspec.heads.settings import NEVER, Calibration
from jaxspec.heads.shipped import find

__all__ = ["NEVER", "Calibration", "EagleHead", "ExitHead", "HydraHeads",
           "MedusaHeads", "Stored", "default_taps", "find", "fingerprint",
           "kinds", "load", "note", "parse", "save"]

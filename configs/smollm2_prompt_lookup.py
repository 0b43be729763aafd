# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M with prompt lookup: a real model that fits on any desk.

  python -m jaxspec decode --config=configs/smollm2_prompt_lookup.py \
    --prompt="Say it again, and better: the cat sat at the mat."
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the settings; every key is the name of a flag."""
  config = ml_collections.ConfigDict()
  config.model = "smollm2-135m"
  config.drafter = "prompt_lookup"
  config.rows = 1
  config.capacity = 2048
  config.chat = True
  config.max_new_tokens = 256
  config.temperature = 0.0
  config.seed = 0
  return config

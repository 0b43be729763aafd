# SPDX-License-Identifier: Apache-2.0
"""Llama 3.1 8B on a TPU v5e-8 host: eight chips, one mesh axis.

The model has eight key/value heads, so `tensor` may be 1, 2, 4 or 8. In
bfloat16 its 16 GB of weights come to 2 GB a chip of 16 GB, and eight rows of
8192 slots to another 1 GB.

  python -m jaxspec decode --config=configs/llama3_8b_v5e.py \
    --config.model=/path/to/Llama-3.1-8B-Instruct \
    --prompts=in.jsonl --output=out.jsonl
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the settings; every key is the name of a flag."""
  config = ml_collections.ConfigDict()
  config.model = "meta-llama/Llama-3.1-8B-Instruct"
  config.dtype = "bfloat16"
  config.mesh = ml_collections.ConfigDict({"data": 1, "tensor": 8})
  config.drafter = "prompt_lookup:length=7"
  config.rows = 8
  config.capacity = 8192
  config.chat = True
  config.max_new_tokens = 512
  config.seed = 0
  return config

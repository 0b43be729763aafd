# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M learns to answer questions of GSM8K while it reads them.

  python -m jaxspec train_streams --config=configs/streams_gsm8k.py:two \
    --data=gsm8k.jsonl --output=FOLDER

`two` streams are a user and an assistant. A third of `three`, the auditor,
notes the sums of the answer as it hears them: what GSM8K has within << and >>.
"""

import ml_collections

_ANSWER = ("{% for part in row.answer.split('<<') %}{% if loop.first %}"
           "{{ part }}{% else %}{{ part.split('>>')[1:]|join('') }}{% endif %}"
           "{% endfor %}")
_SUMS = ("{% for part in row.answer.split('<<')[1:] %}"
         " {{ part.split('>>')[0] }}{% endfor %}")


def get_config(streams: str = "two") -> ml_collections.ConfigDict:
  """Returns the settings; every key is the name of a flag."""
  config = ml_collections.ConfigDict()
  config.model = "smollm2-135m"
  # A token that was learnt once and is not part of any text.
  config.silence = "<filename>"
  config.layout = "reading"
  config.steps = 400
  # In each single row silence is likelier than the first word: without this a
  # greedy answer may never begin, even when all is read.
  config.silence_penalty = ["assistant=5"]
  config.column = [f"assistant={_ANSWER}"]
  config.follow = ["assistant=user:8"]
  if streams == "three":
    config.layout = "auditing"
    config.column = [f"assistant={_ANSWER}", f"auditor={_SUMS}"]
    config.follow = ["assistant=user:8", "auditor=assistant:1"]
  return config

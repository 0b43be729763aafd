# SPDX-License-Identifier: Apache-2.0
"""Kernels for speculative decoding, usable without jaxspec.

Each op is one public function; `implementation=` picks how it is computed.
"""

from pallas_kernels.acceptance.op import Judged as Judged
from pallas_kernels.acceptance.op import accept_nodes as accept_nodes
from pallas_kernels.attention.op import tree_attention as tree_attention
from pallas_kernels.attention.words import pack as pack
from pallas_kernels.attention.words import unpack as unpack
from pallas_kernels.head.law import Forecast as Forecast
from pallas_kernels.head.op import proposal_head as proposal_head
from pallas_kernels.matmul.op import fused_mlp as fused_mlp
from pallas_kernels.matmul.op import quantized_matmul as quantized_matmul
from pallas_kernels.matmul.op import streamed_matmul as streamed_matmul
from pallas_kernels.matmul.stream import early_exit_stream as early_exit_stream
from pallas_kernels.quantized import GroupedQArray as GroupedQArray
from pallas_kernels.quantized import QArray as QArray
from pallas_kernels.target import Target as Target
from pallas_kernels.target import aim as aim
from pallas_kernels.writeback.op import commit_kv as commit_kv

# SPDX-License-Identifier: Apache-2.0
"""Models that read, think and write in several streams at once."""

from jaxspec.streams.layout import Stream as Stream
from jaxspec.streams.layout import StreamLayout as StreamLayout
from jaxspec.streams.model import StreamModel as StreamModel

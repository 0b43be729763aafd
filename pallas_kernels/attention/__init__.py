# SPDX-License-Identifier: Apache-2.0
"""Attention of tokens in flight to a committed prefix and to one another."""

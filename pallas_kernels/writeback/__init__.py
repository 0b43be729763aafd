# SPDX-License-Identifier: Apache-2.0
"""The accepted path of every row, written into the cache."""

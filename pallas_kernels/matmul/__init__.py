# SPDX-License-Identifier: Apache-2.0
"""Products of a few rows with weights that are read once, a layer at a time."""

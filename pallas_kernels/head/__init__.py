# SPDX-License-Identifier: Apache-2.0
"""What a head says: the likeliest tokens and how sure it is, no logits."""

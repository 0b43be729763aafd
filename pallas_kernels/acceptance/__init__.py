# SPDX-License-Identifier: Apache-2.0
"""What a verifier wants to know of the logits behind every node."""

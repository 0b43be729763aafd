# SPDX-License-Identifier: Apache-2.0
"""One transformer, and a short file of sizes and weight names a family."""

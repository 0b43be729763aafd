# SPDX-License-Identifier: Apache-2.0
"""One absl app a file; the only place where flags are defined."""

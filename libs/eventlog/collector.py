"""Settings of the cyclic garbage collector for a process that holds a large, mostly immutable state.

With the interpreter's defaults a leader under load spends about a quarter of its time looking for cycles among state
that has none (measured by bench/log_submit.py). A service calls this once, when it starts.
"""

from __future__ import annotations

import gc


def tune_collector() -> None:
    """Look seldom, and never again at what the imports made."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)

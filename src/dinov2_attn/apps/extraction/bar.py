"""A progress bar that waits for no other process."""

from __future__ import annotations

from tqdm import tqdm

from dinov2_attn._locks import fork_safe_lock


class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """A progress bar whose lock belongs to this process.

    The lock of ``tqdm`` is shared with forks of the process. If one of them is killed while it
    holds the lock, all others wait for ever.
    """

    monitor_interval = 0  # no thread that may hold the lock in a fork


Bar.set_lock(fork_safe_lock())

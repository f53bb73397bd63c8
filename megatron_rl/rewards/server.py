"""Imported by the server that forks reward workers, and by nothing else.

A launcher signals whole process groups. When a run is asked to stop, its trainer still finishes a step
and needs its workers, so the server and all that it forks ignore the request; the trainer ends them.
"""

import signal

import megatron_rl.rewards.worker  # noqa: F401  loaded here once, so that a worker starts in milliseconds

signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)

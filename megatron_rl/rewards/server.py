"""Preloaded by the server process that forks reward workers; nothing else may import it.

A launcher sends signals to whole process groups. A trainer that receives a stop signal still finishes its step and
needs its workers, so the server and the workers that it forks ignore the signal; the trainer ends them.
"""

import signal

import megatron_rl.rewards.worker  # noqa: F401  loaded here once, so that a worker starts in milliseconds

signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)

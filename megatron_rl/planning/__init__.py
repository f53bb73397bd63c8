"""Whether a run fits and how long a step takes, before anything is started."""

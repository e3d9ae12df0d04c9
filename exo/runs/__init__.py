"""The run directory: atomic files, the lock, run.json, and how a run is started, resumed or skipped."""

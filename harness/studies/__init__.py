"""Studies of attention that explain results; no part of a run."""

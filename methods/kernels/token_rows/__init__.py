"""RMS norms and rotations of one token's rows, one kernel each."""

"""Public benchmarks, from a file or as fetched: each prompt has the length it has."""

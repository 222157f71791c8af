"""What a run measures: configuration, plan, and the passes that make rows."""

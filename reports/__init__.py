"""Tables, figures and the self-contained HTML page made from a run."""

"""One model, one prompt: loading, prefill and decode under a cache method."""

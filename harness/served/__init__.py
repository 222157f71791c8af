"""A model behind an OpenAI-compatible server: the requests, and what the server does with them. No engine, no run."""

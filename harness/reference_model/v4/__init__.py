"""A small DeepSeek-V4 of stock classes, trained on the reference model's text: compressed entries, native indexer."""

"""Training data, training and evaluation of the Neural Memory Indexer."""

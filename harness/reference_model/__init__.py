"""The embedded reference model: tokenizer, training data, training, evaluation and the shipped weights."""

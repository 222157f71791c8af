"""Quest: pages chosen by an upper bound of their logits."""

"""What the methods share that free tokens by score: budgets, scores, and storage of sets that differ by head."""

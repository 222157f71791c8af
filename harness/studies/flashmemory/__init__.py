"""What of FlashMemory's printed numbers can be checked by arithmetic and the model's geometry alone. No torch."""

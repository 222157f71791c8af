"""DeepSeek-V4 (stock transformers classes) under dense, recency, random and lsa over its compressed entries."""

"""The entries that DeepSeek-V4's own indexer scores highest, among those that are resident."""

"""``kvscope dsa``: training and judging a lightning indexer from what ``kvscope lsa collect`` stored."""

"""K and V of single tokens in pages: the backend of every model whose type is not in the table of backends."""

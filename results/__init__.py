"""Result rows: schema, append-only store, data frames and paired statistics."""

"""MSA: blocks chosen by the best key in them."""

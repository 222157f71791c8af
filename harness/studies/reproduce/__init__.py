"""Reproductions: profiles of cells that stand for a paper's rows, measured by the machinery of ``kvscope run``."""

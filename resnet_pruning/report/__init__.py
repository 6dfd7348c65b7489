"""Figures, tables and notebooks, from tables and arrays: nothing here imports torch."""

"""Converted models without Python between their operators: what a call did once is recorded, and replayed."""

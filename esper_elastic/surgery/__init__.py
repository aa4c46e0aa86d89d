"""Edits of a live model's structure: what metadata cannot express."""

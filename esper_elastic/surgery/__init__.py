"""Edits of a live model's structure, and their exact rollback."""

from .transaction import transaction, twins

__all__ = ["transaction", "twins"]

"""Changing the structure of live models: edits, validators, and transactions that undo exactly what fails."""

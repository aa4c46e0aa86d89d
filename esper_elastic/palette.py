"""The colours of every picture: of the demo and of the report on a run.

Owns which colour means what. Each has a light page's shade and a dark page's.
"""

from __future__ import annotations

INK, QUIET, GRID = "#1f2430", "#6b7280", "#e6e8ec"

#: What happened to a network -> its colour on a light page, and on a dark one.
HAPPENINGS = {
    "grow": ("#2a9d8f", "#4cc9b0"),
    "resize": ("#2f6690", "#74b3e8"),
    "prune": ("#e07a1f", "#f4a261"),
    "switch": ("#7b2cbf", "#b794f4"),
    "surgery": ("#c2388f", "#f28fc9"),
    "refused": ("#b00020", "#ff6b6b"),
}

"""Layers as data: which kinds there are, what their arguments may be, and how they are built."""

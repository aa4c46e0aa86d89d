"""What the surgeon does to a model: layers inserted, removed and changed, skips, and how all of it sits in live modules."""

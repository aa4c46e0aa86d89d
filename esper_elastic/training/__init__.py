"""The trainer that takes decisions, and what watches over it."""

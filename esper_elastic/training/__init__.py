"""Training under decisions: a network that changes its own architecture while it trains, under a hand that keeps it safe."""

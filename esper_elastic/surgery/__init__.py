"""Surgery on live models: what no width can express."""

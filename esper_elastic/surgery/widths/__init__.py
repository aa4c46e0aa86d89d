"""The size of one dim of a plain model, changed through everything that is coupled with it."""

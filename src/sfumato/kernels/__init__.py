"""Functions below the layers: batch-invariant operations, CPU attention and convolutions."""

"""Functions below the layers: batch-invariant operations, attention and convolutions on a CPU."""

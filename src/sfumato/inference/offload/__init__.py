"""Networks whose weights stay on disk or in host memory while they run."""

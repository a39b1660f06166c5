"""Cases of benchmarks/behaviour.py, and the process that runs them with one version."""

"""Cases of benchmarks/behaviour.py, and the child process that runs them with one version of the
code.
"""

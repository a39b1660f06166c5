"""Shared parts of the tests: small models, oracles, encoders, pipelines and processes.

`tests/` is on the path of a test run (`pythonpath` of pyproject.toml), so a test imports
`from helpers.models import tiny_model`. Nothing here runs at import but definitions.
"""

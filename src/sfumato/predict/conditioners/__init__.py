"""Conditioners: prompts -> Conditioning. One file each, found by name; the class is the file's name in CamelCase.

A conditioner has `__call__(prompts) -> Conditioning`, `null(count) -> Conditioning`, `from_labels(labels) -> Conditioning` where the data
have labels, `to_config()` and `from_config(values)`.
"""

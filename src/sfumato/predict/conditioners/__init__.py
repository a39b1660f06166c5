"""Conditioners: prompts -> Conditioning. One file each, found by name; the class is the file's name in CamelCase.

A conditioner has `__call__(prompts, picture=None) -> Conditioning`, `null(count, picture=None) -> Conditioning`, `from_labels(labels) ->
Conditioning` where the data have labels, and `to_config()`. It comes back by `from_config(values)`; one with weights has `save(folder)` and
`from_folder(folder)` instead, `to(device)`, `tensors()`, `identity()` (all that decides its answers, for hashing) and `index()` (its entries
of model_index.json). One with two text encoders takes `prompts_2` beside, what the second reads.
"""

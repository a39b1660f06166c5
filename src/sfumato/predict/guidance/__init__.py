"""Guidance is reference x weight x combine: what to move away from, how far, and how the
predictions become one.

weights/     w(t), or w of the predictions: one file each, found by name
combines/    prediction = f(conditional, references, w): one file each, found by name
guide.py     puts the questions, and skips the references where w is 1
algebra.py   the few lines that combines and weights share
settings.py  `Guidance`: all of it as one number, one line of text or one JSON object; and `build`,
             which makes it a run's questions

What to move away from (no condition, a weaker network) touches networks, so it lives next door in
predict/references/.
"""

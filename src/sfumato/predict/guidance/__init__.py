"""Guidance is reference x weight x combine: what to move away from, how far, and how the two predictions become one.

weights/    w(t), or w of the predictions: one file each, found by name
combines/   prediction = f(conditional, references, w): one file each, found by name
guide.py    puts the questions, and skips the references where w is 1
"""

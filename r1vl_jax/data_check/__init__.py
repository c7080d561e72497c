"""Implements `python -m r1vl_jax.data.check`, which reads a configuration's data as training would, and reports on it.

Flow: the configuration's data sets -> read_rows with training's encoding -> one small Record per example -> numbers ->
text on standard output, FOLDER/check.json and FOLDER/check.png.

    records.py    defines the values: a Record per example, a Survey per data set
    parts.py      lists the data sets of a configuration, and the batches that training makes of them
    reading.py    reads rows into records
    solutions.py  scores every solution against itself
    numbers.py    computes the numbers of check.json from the records
    text.py       formats the numbers as text
    figure.py     draws check.png from the records
    command.py    is the command line
"""

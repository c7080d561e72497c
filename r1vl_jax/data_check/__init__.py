"""What `python -m r1vl_jax.data.check` does: reads the data of a configuration as training would, and reports on it.

Flow: the configuration's data sets -> read_rows with training's encoding -> one small Record a row -> numbers -> text
on standard output, FOLDER/check.json and FOLDER/check.png.

    records.py  the values: a Record for each example, a Survey for each data set
    parts.py    the data sets of a configuration, and the batches that training makes of them
    reading.py  rows -> records
    numbers.py  records -> numbers, as check.json has them
    text.py     numbers -> text
    figure.py   records -> check.png
    command.py  the command line
"""

"""Composing tuners into one, with the error that it makes: a file for each kind of tuner, and the table of rules."""

"""The command line: a file for each command; main.py puts them together."""

"""The command line: one Typer application, in which a command is a file.

Importing it imports nothing heavy; each command imports what it needs when it runs.
"""

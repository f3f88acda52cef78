"""Graphs to look at and to try: an example team, and the demonstration that kills one of it."""

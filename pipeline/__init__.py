"""Graphs in, graphs out: asks `calibrate` for numbers."""

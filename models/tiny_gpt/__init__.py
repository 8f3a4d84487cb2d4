"""A small decoder-only transformer, trained on the text that ships with Python."""

"""The IPython extension: the `%%durable` cell magic."""

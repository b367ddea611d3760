"""Dispersive Loss: learn it, test it, plug it in."""

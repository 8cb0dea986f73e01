"""Measurements of a trained run: predictions, sharpness, shift, landscapes."""

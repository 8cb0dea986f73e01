"""What is measured of a trained run: predictions, sharpness, shift, landscapes."""

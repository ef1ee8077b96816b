"""What :mod:`pyprune.data` is made of: one module for each source of images, and what they share."""

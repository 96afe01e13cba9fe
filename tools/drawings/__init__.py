"""Drawings of README and docs as SVG files, each for a light and a dark page."""

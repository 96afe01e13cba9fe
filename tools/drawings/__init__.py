"""Drawings of README and docs/how-it-works.md as SVG files, each for a light and a dark page."""

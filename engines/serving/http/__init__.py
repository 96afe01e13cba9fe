"""Connections and bytes: framing, codings, limits."""

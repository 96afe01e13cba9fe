"""Measurements of the product on this machine: each writes a record, and from it the section of a document."""

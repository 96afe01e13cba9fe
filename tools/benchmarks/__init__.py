"""Measurements of the product on this machine; each writes a section of a document from a record, through a template."""

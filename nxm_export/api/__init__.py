"""The public Python interface, behind the names of `nxm_export.__all__`: functions on paths, and objects for the
stages."""

"""The public Python interface, behind the names of `nxm_export.__all__`: functions on paths, and objects for the
stages."""

from nxm_export.own_packages import require_own_packages

require_own_packages()  # what is in here imports `compressors` and `engines`

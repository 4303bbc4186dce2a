"""Reads run folders: tables, figures, report."""

import os

# Before matplotlib is imported, which refuses a backend that is not installed: a notebook hands its own to commands
# that it starts. Files are drawn here, whatever it says.
os.environ["MPLBACKEND"] = "agg"

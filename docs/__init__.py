"""Pages, and what draws their figures."""

import os

os.environ["MPLBACKEND"] = "Agg"  # as in lab

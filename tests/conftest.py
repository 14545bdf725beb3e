"""One thread for each process of tests: as many run at once as there are cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

"""docs/performance_growth.png from the folders of five benchmarks, for which docs/performance.md has the commands:

python docs/performance_growth.py RESOLUTION BATCH RANK ALIGN CACHE
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from asymflow_ft.bench.charts import PANELS, growth_lines, sweep_panels

*sweeps, align, cache = (json.loads((Path(folder) / "bench.json").read_text()) for folder in sys.argv[1:])
figure = Figure(figsize=(8, 9), layout="constrained")
*rows, last = figure.subplots(len(sweeps) + 1, 2)
for result, panels in zip(sweeps, rows, strict=True):
    sweep_panels(result, dict(zip(PANELS, panels, strict=True)))
growth_lines(last[0], {"align": align["growth"]}, "pictures")
growth_lines(last[1], cache["growth"], "pictures in the data set")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)

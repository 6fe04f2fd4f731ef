"""Official benchmarks: pictures in the layout that their scorers read, and the scores that these write.

docs/benchmarks.md specifies every layout. Each module has `check`, `write_layout`, `read_scores` and `how_to_score`.
"""

from types import ModuleType

from asymflow_ft.evaluation.benchmarks import dpg, geneval, hpsv3

BENCHMARKS: dict[str, ModuleType] = {"geneval": geneval, "dpg": dpg, "hpsv3": hpsv3}  # by the name of their suite

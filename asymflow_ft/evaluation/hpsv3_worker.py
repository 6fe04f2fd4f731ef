"""Run by the Python that has the hpsv3 package: hpsv3_worker.py DEVICE TASKS.jsonl. Prints a line `score VALUE` for
each line {"prompt", "file"}. Imports nothing of asymflow_ft."""

import json
import sys

import torch
from hpsv3 import HPSv3RewardInferencer

device, tasks = sys.argv[1:]
scorer = HPSv3RewardInferencer(device=device)
with open(tasks, encoding="utf-8") as lines, torch.inference_mode():
    for line in lines:
        task = json.loads(line)
        # by keyword: versions differ in the order
        mean = scorer.reward(prompts=[task["prompt"]], image_paths=[task["file"]])[0][0].item()
        sys.stdout.write(f"score {mean}\n")
        sys.stdout.flush()

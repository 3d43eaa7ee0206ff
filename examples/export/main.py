"""Read token ids with an exported model, without memlib: python main.py model.pt2 < ids.txt

Prints a line for each token: its logits, from which the next token is predicted.
"""

import sys

import torch
import torch._inductor

step = torch._inductor.aoti_load_package(sys.argv[1])
inputs = []
for line in step.get_metadata()["inputs"].splitlines():
    name, dtype, *sizes = line.split()
    inputs.append(torch.zeros([int(size) for size in sizes], dtype=getattr(torch, dtype)))
ids, mask, start, *state = inputs

stream = torch.tensor([int(word) for word in sys.stdin.read().split()])
for number, segment in enumerate(stream.split(ids.shape[1])):
    n = len(segment)
    ids[0, :n], mask[0, :n], mask[0, n:] = segment, True, False  # other rows stay empty
    start[0] = number == 0
    logits, *state = step(ids, mask, start, *state)
    for row in logits[0, :n].tolist():
        print(*row)

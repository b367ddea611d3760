"""One optimizer step as configured; the first process writes the gradient it was taken with."""

import json
import sys
from importlib import import_module

from safetensors.torch import save_file

from dispersive_kit.training import TrainConfig, train

config, out = TrainConfig.from_json(sys.argv[1]), sys.argv[2]
loop = import_module("dispersive_kit.training.train")
real_begin = loop.begin


def begin(*args, **kwargs):
    run = real_begin(*args, **kwargs)

    def keep(optimizer, *_):
        if run.accelerator.is_main_process:
            grads = {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}
            save_file(grads, f"{out}.safetensors")

    run.optimizer.optimizer.register_step_pre_hook(keep)
    return run


loop.begin = begin
records = list(train(config, out))
print(json.dumps(records[-1].values))

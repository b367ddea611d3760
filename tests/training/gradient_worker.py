"""One optimizer step as configured; the first process writes the gradient it was taken with."""

import json
import sys
from importlib import import_module

from safetensors.torch import save_file

from dispersive_kit.training import TrainConfig, train

config, out = TrainConfig.from_json(sys.argv[1]), sys.argv[2]
loop = import_module("dispersive_kit.training.train")


class Observed(loop.Session):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.optimizer.optimizer.register_step_pre_hook(self.keep)

    def keep(self, *_):
        if self.accelerator.is_main_process:
            grads = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
            save_file(grads, f"{out}.safetensors")


loop.Session = Observed
records = list(train(config, out))
print(json.dumps(records[-1].values))

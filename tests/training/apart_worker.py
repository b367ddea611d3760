"""Train in a folder that each process has for itself."""

import os
import sys

from dispersive_kit.training import TrainConfig, train

os.chdir(f"{sys.argv[2]}/{os.environ['RANK']}")
list(train(TrainConfig.from_json(sys.argv[1]), "run", resume=True))

"""Study: notebooks run headlessly, and what they measured brought together."""

from dispersive_kit.study.notebook import NotebookRun, begin
from dispersive_kit.study.pipeline import PIPELINES, Stage, run_notebook, run_pipeline

__all__ = ["PIPELINES", "NotebookRun", "Stage", "begin", "run_notebook", "run_pipeline"]

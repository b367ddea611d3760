"""Study: notebooks run headlessly, and what they measured brought together."""

from dispersive_kit.study.execute import run_notebook
from dispersive_kit.study.notebook import NotebookRun, begin
from dispersive_kit.study.pipeline import Pipeline, Stage, load_pipeline, run_pipeline

__all__ = ["NotebookRun", "Pipeline", "Stage", "begin", "load_pipeline", "run_notebook", "run_pipeline"]

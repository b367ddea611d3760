"""Study: notebooks run headlessly, and pre-registered experiments."""

from dispersive_kit.study.notebook import NotebookRun, begin

import re

import pytest

from dispersive_kit.study.pipeline import Stage, run_pipeline
from dispersive_kit.study.report import write_report

FIGURE = '<figure><img alt="a dot" src="data:image/png;base64,AA=="></figure>'
SHOW = f"from IPython.display import HTML, display\ndisplay(HTML('''{FIGURE}'''))"
RECORD = "dict(name='FD', value=3.0, low=2.5, high=3.5, floor=1.0)"


@pytest.fixture
def page(write_notebook, write_quick, tmp_path):
    made = write_notebook(
        "made",
        "nb.record('half', value / 2, note='of value')\nnb.check('positive', value > 0)\nnb.say('It is so.')",
        f"nb.record('FD', 3.0, record={RECORD})",
        SHOW,
        "nb.finish()",
    )
    broken = write_quick("broken", "assert seed != 1, 'one is not enough'")
    stages = [Stage(str(made)), Stage(str(broken), name="seeds", grid={"seed": [0, 1, 2]})]
    results = list(run_pipeline(stages, tmp_path / "out"))
    return write_report(results, tmp_path / "out", title="A & B").read_text()


def test_the_report_shows_everything_in_one_offline_file(page):
    assert "A &amp; B" in page and "It is so." in page and 'alt="a dot"' in page and "1 check passed" in page
    assert "half" in page and "0.75" in page and "2.50 to 3.50" in page
    assert re.search(r'class="failed">failed</td>', page) and "one is not enough" in page
    assert '<td class="failed">2 ok, 1 failed</td>' in page
    assert "Mean of 2 runs" in page and "seeds/seed=1: failed" in page
    assert "torch 2" in page and re.search(r"\d+\.\d GiB", page)
    assert page.count("floor</th>") == 1 < page.count("95 % interval</th>")  # no column in which nothing stands
    # One file, and no address.
    assert "://" not in page and "<script" not in page and "<link" not in page
    assert "default-src 'none'" in page.partition("<body>")[0]
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)"', page))

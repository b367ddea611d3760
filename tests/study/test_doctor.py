from dispersive_kit.study.doctor import examine


def test_every_finding_says_what_was_seen_and_a_fault_has_a_fix(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    monkeypatch.setenv("DISPERSIVE_KIT_RUNS", str(blocked / "runs"))
    findings = {f.name: f for f in examine()}
    assert all(f.detail for f in findings.values())
    assert not findings["runs folder"].ok and "DISPERSIVE_KIT_RUNS" in findings["runs folder"].fix
    assert findings["Python"].ok and findings["PyTorch"].ok and findings["notebook packages"].ok


def test_an_old_torch_is_found(monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.5.1+cpu")
    finding = next(f for f in examine() if f.name == "PyTorch")
    assert not finding.ok and "2.6" in finding.fix

from qwen2vl_trt.engines import progress


def test_off_a_terminal_lines_are_written_where_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    said = ""
    with progress.progress_bar(lines=True) as bar:
        bar.update(bar.add_task("measuring", total=4), advance=1)
        while "1 of 4" not in said:
            said += capsys.readouterr().err
    assert "measuring: 1 of 4, " in said
    capsys.readouterr()
    with progress.progress_bar() as bar:
        bar.add_task("building", total=4)
    assert capsys.readouterr().err == ""

"""What a person sees of an export: how many images, what is left out, and one line for what is wrong."""

import shutil

from jobs.cli import main
from tests.conftest import draw_image
from tests.pipeline.outputs import small_output, write_output


def test_what_is_exported_here_is_an_output_to_every_job(tmp_path):
    small = small_output(tmp_path)
    for job in (["status"], ["verify"], ["report", "--to", str(tmp_path / "page.html")]):
        assert main([job[0], str(small.output), *job[1:]]) == 0


def test_an_export_says_what_it_has_written_and_what_it_has_left_out(tmp_path, capfd):
    for number in range(3):
        draw_image(tmp_path / f"in/{number}.jpg", 60, 40, number)
    write_output(str(tmp_path / "in"), str(tmp_path / "out"))

    def swath(kind: str, *options: str) -> tuple[int, str, str]:
        code = main(["export", str(tmp_path / "out"), str(tmp_path / kind), "--format", kind, *options])
        return code, *capfd.readouterr()

    (tmp_path / "in/1.jpg").unlink()
    for again in ("", ", which was there already"):
        code, out, _ = swath("huggingface")
        assert code == 0
        assert f"exported 2 images{again}: {tmp_path}/huggingface\n" in out
        assert "left out 1 missing since they were segmented; see left_out" in out
    assert swath("png")[1] == f"exported 3 images: {tmp_path}/png\n"
    code, _, errors = swath("png", "--limit", "2")
    assert (code, errors.count("\n")) == (2, 1)
    assert errors.startswith("swath: error:")
    assert "--overwrite" in errors
    code, _, errors = swath("coco", "--where", "regexp_matches(uri, '(')")
    assert (code, errors) == (
        2,
        "swath: error: where \"regexp_matches(uri, '(')\": Invalid Input Error: missing ): (\n",
    )
    assert swath("coco", "--limit", "0") == (2, "", "swath: error: limit: must be 1 or more (got '0')\n")
    shutil.rmtree(tmp_path / "in")
    code, out, _ = swath("huggingface", "--overwrite")
    assert (code, "exported 0 images" in out) == (1, True)

"""Images are data: nothing that is in one makes its decoder open a file, a connection or a program."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.decode import DecodeError, decode
from tests.pipeline.gallery import COLOUR, gallery, tiff

ROOT = Path(__file__).parents[2]
SECRET = "file-that-no-image-may-read"
# What other decoders follow: entities, references to pictures, PostScript, companions of OME-TIFF, playlists, commands.
HOSTILE = {
    "svg": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///{SECRET}" width="9" height="9"/></svg>',
    "xml": f'<!DOCTYPE svg [<!ENTITY x SYSTEM "file:///{SECRET}">]><svg><text>&x;</text></svg>',
    "ps": f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({SECRET}) (r) file\n%%EOF\n",
    "pdf": "%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\n%%EOF\n",
    "mvg": f"push graphic-context\nimage over 0,0 0,0 'https://127.0.0.1/{SECRET}'\npop graphic-context\n",
    "m3u": f"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/{SECRET}\n",
    "gim": "GIMP Palette\n",
    "fli": "\x00" * 4 + "\x11\xaf" + "\x00" * 200,
}
PROGRAM = """
import json, os, resource, sys
from pathlib import Path
from pipeline.decode import DecodeError, decode, read_header
import io
files = sorted(Path(sys.argv[1]).iterdir())
blobs = [path.read_bytes() for path in files]

def run():
    results = []
    for blob in blobs:
        try:
            found = decode(blob, 10_000_000)
            results.append([found.height, found.width, int(found.pixels.astype("int64").sum())])
        except DecodeError as error:
            results.append(error.status)
        try:
            read_header(io.BytesIO(blob))
        except DecodeError:
            pass
    return results

expected = run()  # whatever a library loads, it loads here
opened, watched = [], [True]
EVENTS = ("open", "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "ctypes", "import")
sys.addaudithook(lambda event, found: watched[0] and event.startswith(EVENTS) and opened.append(f"{event} {found[:1]}"))
free = next(number for number in range(1000) if not os.path.exists(f"/proc/self/fd/{number}"))
resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))  # what the hook does not see would fail
again, seen = run(), list(opened)
try:
    open("/dev/null")
    sys.exit("this test sees nothing")
except OSError:
    assert opened[len(seen):] == ["open ('/dev/null',)"]
watched[0] = False
decoded = sum(isinstance(one, list) for one in again)
print(json.dumps({"same": expected == again, "opened": seen, "decoded": decoded}))
"""


def test_no_decoder_opens_a_file_a_connection_or_a_program(tmp_path):
    for number, picture in enumerate(gallery()):
        (tmp_path / f"{number:04d}").write_bytes(picture.data)
    for name, text in HOSTILE.items():
        (tmp_path / f"hostile-{name}").write_bytes(text.encode("latin-1"))
    companion = f'<OME><Image><Pixels><TiffData><UUID FileName="/{SECRET}.tif"/></TiffData></Pixels></Image></OME>'
    for samples in (COLOUR, COLOUR.astype("uint16")):
        (tmp_path / f"ome-{samples.dtype}").write_bytes(tiff(samples, description=companion))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert found["opened"] == []
    assert found["same"]
    assert found["decoded"] >= 200


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_image_is_unsupported_or_unreadable(name):
    with pytest.raises(DecodeError):
        decode(HOSTILE[name].encode("latin-1"), 10_000_000)
